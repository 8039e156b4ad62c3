"""The captions of fine-tuning: true, as the matrix says, and the same for every run of a seed."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_birds import BANK, bird_vlm

from dealkit import DealConfig, finetune
from dealkit.datasets import Birdworld
from dealkit.datasets.birdworld import COLOURS, PARTS
from dealkit.training import draw_captions

DEAL = DealConfig(lr=1e-3, batch_size=8)


@pytest.mark.parametrize("share", [0., .6, 1.])
def test_captions_are_true_where_the_matrix_says_so_and_nowhere_else(share):
    """Oracle: read the captions word by word and look at the birds."""
    birds = Birdworld(n=64)
    categories = [birds.categories[y] for y in birds.labels]
    captions, true = draw_captions(categories, BANK, replace(DEAL, concept_captions=share), np.random.default_rng(3))
    assert true.shape == (64, 64) and true.dtype == torch.bool
    kinds = set()
    for j, caption in enumerate(captions):
        words = caption.replace(",", "").split()
        named = [word for word in words if word in birds.categories]
        parts = [(PARTS.index(part), COLOURS.index(colour)) for colour, part in zip(words, words[1:]) if part in PARTS]
        assert named in ([], [categories[j]]) and (named or parts)
        kinds.add((bool(named), bool(parts)))
        for i in range(64):
            fits = all(birds.attributes[i, p] == c for p, c in parts) and (not named or categories[i] == named[0])
            assert true[i, j] == fits, (i, caption)
    assert true.diagonal().all() and not true.all()
    plain, both, concepts = (True, False), (True, True), (False, True)
    assert kinds == {0.: {plain}, .6: {plain, both, concepts}, 1.: {both, concepts}}[share]


def test_captions_depend_on_seed_and_step_alone():
    categories = ["zorvit", "pelmar"] * 8
    draw = lambda *key: draw_captions(categories, BANK, DEAL, np.random.default_rng(key))[0]  # noqa: E731
    assert draw(0, 1) == draw(0, 1) != draw(0, 2) and draw(0, 1) != draw(1, 1)


def test_every_step_draws_its_own_captions(monkeypatch):
    seen = []

    def note(*args):
        seen.append(args[-1].bit_generator.state["state"]["state"])
        return draw_captions(*args)

    monkeypatch.setattr("dealkit.training.loop.draw_captions", note)
    for config in (replace(DEAL, epochs=2), replace(DEAL, seed=1)):
        finetune(bird_vlm(), Birdworld(n=16), BANK, config, progress=False)
    assert len(set(seen)) == 6 and len(seen) == 6                        # a stream of its own for every seed and step
