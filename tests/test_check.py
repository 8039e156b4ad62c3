"""The frame of the checks: whatever a student writes, an answer comes back, and it says what to do."""

from __future__ import annotations

import pytest
import torch

import dealkit.check
from dealkit.check.result import Hint, Result, call, exercise, other, same


@exercise(start="Begin with one map.", right="That was it.")
def ex_99_1(answer):
    """A function of maps [B, K] that returns their sum."""
    value = call(answer, torch.ones(2, 3))
    if same(value, 1.0):
        return Hint("mean", "This is the mean of the maps and not their sum, look again.")
    return None if same(value, 6.0) else other("Try two ones: the sum is 2.")


def unwritten(maps):
    raise NotImplementedError


@pytest.mark.parametrize("answer", [..., None, lambda maps: None, lambda maps: ..., unwritten],
                         ids=["dots", "none", "returns none", "returns dots", "not implemented"])
def test_an_empty_answer_gets_the_first_step(answer):
    result = ex_99_1(answer)
    assert (bool(result), result.mistake, result.text) == (False, "start", "Begin with one map.")


def test_right_wrong_and_unknown():
    assert ex_99_1(torch.sum) == Result("ex_99_1", True, "", "That was it.")
    assert ex_99_1(torch.mean).mistake == "mean" and ex_99_1(torch.prod).mistake == "mean"
    assert ex_99_1(torch.std).mistake == "other"


def broken(maps):
    unused = maps * 2
    return unused[5]


def test_an_exception_of_the_student_says_where_and_on_what():
    result = ex_99_1(broken)
    assert not result and result.mistake == "error"
    assert result.text.startswith("Your code stopped in the line `return unused[5]`, on tensors of shape (2, 3): IndexError:")
    assert "stopped, on tensors of shape (2, 3): RuntimeError" in ex_99_1(max).text          # no line of a student's


@pytest.mark.parametrize("answer", [3, "six", torch.ones(2), object(), lambda maps: "six", lambda: 6],
                         ids=["number", "text", "tensor", "object", "text from a function", "no argument"])
def test_an_answer_of_another_form_does_not_raise(answer):
    result = ex_99_1(answer)
    assert not result and result.mistake == "error"
    assert "A function of maps [B, K] that returns their sum." in result.text or "Your code stopped" in result.text


def test_it_reads_as_a_sentence_of_lines_that_fit():
    assert repr(ex_99_1(torch.sum)) == "ex_99_1: right. That was it."
    assert repr(ex_99_1(...)).startswith("ex_99_1: not yet. Begin")
    long = repr(Result("ex_99_1", False, "x", "word " * 60))
    assert "\n" in long and max(map(len, long.splitlines())) <= 100 and long.split() == ["ex_99_1:", "not", "yet."] + ["word"] * 60


def test_the_same_values_of_another_shape_are_not_the_same():
    assert same([1, 2], torch.tensor([1., 2.])) and not same(torch.ones(2, 1), torch.ones(1, 2))
    assert not same(float("nan"), 1.) and not same(1.1, 1.)


def test_every_check_is_exported_and_described():
    for name in dealkit.check.__all__[1:]:
        assert getattr(dealkit.check, name)(...).mistake == "start"
        assert len(getattr(dealkit.check, name).__doc__.splitlines()[0]) > 15
