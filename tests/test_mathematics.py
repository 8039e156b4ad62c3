"""The mathematics that a notebook shows is the module's: its tagged cells are run alone and compared on random maps."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
import torch
from tiny_birds import bird_vlm
from torch.testing import assert_close

import dealkit
from dealkit import metrics
from dealkit.datasets import Birdworld

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def shown(name: str, *tags: str) -> dict:
    """What the cells with these tags define, run in the notebook's order with nothing but torch in reach."""
    names = {"torch": torch, "cosine_similarity": torch.nn.functional.cosine_similarity,
             "interpolate": torch.nn.functional.interpolate}
    found = []
    for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells:
        matching = set(cell.metadata.get("tags", [])) & set(tags)
        if matching:
            found += matching
            exec(cell.source, names)
    assert sorted(found) == sorted(tags), f"cells tagged {sorted(set(tags) - set(found))} are missing"
    return names


@pytest.fixture(params=[0, 1, 2])
def maps(request) -> torch.Tensor:
    maps = torch.randn(6, 6, 10, 10, generator=torch.Generator().manual_seed(request.param)).relu()
    maps[0, 0] = 0                                                       # a dead one
    return maps


def test_regularisers_of_notebook_03(maps):
    here = shown("03_deal_finetuning", "normalise", "disentangle", "localize")
    assert_close(here["normalise"](maps), dealkit.normalize_maps(maps))
    assert_close(here["disentangle"](maps[:, :5]), dealkit.disentangle_loss(maps[:, :5]))
    assert_close(here["localize"](maps[:, :5], maps[:, 5]), dealkit.localize_loss(maps[:, :5], maps[:, 5]))


def test_methods_of_notebook_02():
    here = shown("02_entanglement_diagnosis", "contributions", "relevance", "normalise", "gradeclip", "legrad")
    vlm, images = bird_vlm(), Birdworld("test", n=6).batch(range(6))["image"]
    text = torch.randn(6, vlm.tower.output_dim, generator=torch.Generator().manual_seed(0))
    for method, kind in (("relevance", "attention"), ("gradeclip", "context"), ("legrad", "exits")):
        by_hand = here[method](vlm.tower.split(images, kind=kind), text, vlm.grid)
        assert by_hand.max() > 0
        assert_close(by_hand, dealkit.explain(vlm, images, text[:, None], method=method)[:, 0])


def test_entanglement_of_notebook_02(maps):
    here = shown("02_entanglement_diagnosis", "normalise", "cosine_overlap", "disentanglability")
    assert_close(here["normalise"](maps), dealkit.normalize_maps(maps))
    assert_close(float(here["cosine_overlap"](maps[1:])), metrics.overlap(maps[1:], "cosine"), rtol=1e-5, atol=1e-6)
    assert_close(float(here["disentanglability"](maps)), metrics.disentanglability(maps), rtol=1e-4, atol=1e-5)


def test_localization_of_notebook_02(maps):
    here = shown("02_entanglement_diagnosis", "normalise", "pointing_game", "mass_in_mask")
    masks = torch.rand(6, 6, 80, 80, generator=torch.Generator().manual_seed(9)) < 0.3
    for name in ("pointing_game", "mass_in_mask"):
        shown_value = float(here[name](maps[1:], masks[1:]).float().mean())
        assert_close(shown_value, getattr(metrics, name)(maps[1:], masks[1:]), rtol=1e-5, atol=1e-6)
