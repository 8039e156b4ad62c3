"""Recall at k: by hand, against a sort, and at its bounds."""
from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import torch

from dealkit.metrics import first_relevant, recall_at_k, retrieval


def found_among(scores: list[float], right: list[bool], k: int) -> bool:
    order = sorted(range(len(scores)), key=lambda i: scores[i], reverse=True)
    return any(right[i] for i in order[:k])


def test_the_examples_in_the_docstrings_run():
    result = doctest.testmod(retrieval)
    assert result.attempted > 0 and result.failed == 0


def test_recall_by_hand():
    scores = torch.tensor([[.9, .5, .1], [.1, .5, .9], [.5, .9, .1]])
    relevant = torch.tensor([[True, False, False], [True, True, False], [False, False, True]])
    assert first_relevant(scores, relevant).tolist() == [1, 2, 3]
    assert [recall_at_k(scores, relevant, k) for k in (1, 2, 3, 9)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert recall_at_k(scores, relevant, 2, reduction="none").tolist() == [1, 1, 0]
    assert isinstance(recall_at_k(scores, relevant, 1), float)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_recall_equals_a_sort_by_hand(k):
    generator = torch.Generator().manual_seed(k)
    scores = torch.randn(40, 11, generator=generator, dtype=torch.float64)
    relevant = torch.rand(40, 11, generator=generator) < .15
    expected = [found_among(s, r, k) if any(r) else math.nan for s, r in zip(scores.tolist(), relevant.tolist())]
    assert 0 < np.isnan(expected).sum() < 20
    np.testing.assert_array_equal(recall_at_k(scores, relevant, k, reduction="none"), expected)
    assert recall_at_k(scores, relevant, k) == pytest.approx(np.nanmean(expected))


def test_equal_scores_are_no_hit():
    """A model that scores everything the same finds nothing; one that ties with a single wrong item comes second."""
    relevant = torch.eye(4, dtype=torch.bool)
    flat = torch.zeros(4, 4)
    assert [recall_at_k(flat, relevant, k) for k in (1, 3, 4)] == [0, 0, 1]
    assert first_relevant(torch.tensor([[.5, .5, .1]]), torch.tensor([[True, False, False]])).tolist() == [2]
    both = torch.tensor([[True, True, False]])                           # equal scores of two right ones harm nobody
    assert first_relevant(torch.tensor([[.5, .5, .1]]), both).tolist() == [1]


def test_a_query_without_anything_to_find_is_undefined():
    scores, relevant = torch.tensor([[.9, .1], [.9, .1]]), torch.tensor([[True, False], [False, False]])
    assert recall_at_k(scores, relevant, 1) == 1
    assert math.isnan(recall_at_k(scores[1:], relevant[1:], 1))
    infinite = torch.tensor([[-torch.inf, 0.]])
    assert first_relevant(infinite, torch.tensor([[True, False]])).tolist() == [2]


SCORES, RELEVANT = torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize("call, error, message", [
    (lambda: recall_at_k(SCORES, RELEVANT, 0), ValueError, "k is 0; expected a whole number"),
    (lambda: recall_at_k(SCORES, RELEVANT, True), ValueError, "k is True"),
    (lambda: recall_at_k(SCORES, RELEVANT, 1.5), ValueError, "k is 1.5"),
    (lambda: recall_at_k(SCORES.int(), RELEVANT, 1), TypeError, "floating-point tensor"),
    (lambda: recall_at_k(SCORES, RELEVANT.int(), 1), TypeError, "relevant is torch.int32; expected a bool tensor"),
    (lambda: recall_at_k(SCORES, RELEVANT.tolist(), 1), TypeError, "relevant is list"),
    (lambda: recall_at_k(SCORES, RELEVANT[:1], 1), ValueError, r"scores have shape \(2, 3\), relevant \(1, 3\)"),
    (lambda: recall_at_k(SCORES * math.nan, RELEVANT, 1), ValueError, "scores hold NaN"),
    (lambda: recall_at_k(SCORES, RELEVANT, 1, "sum"), ValueError, "reduction"),
])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
