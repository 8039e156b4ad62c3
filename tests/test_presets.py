"""Presets of photographs: model, data, bank and settings that belong together, on tiny data with a tiny model."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny_clip
import tiny_photos
import torch

import dealkit
from dealkit import presets
from dealkit.presets import BATCH_SIZES, BIRDWORLD, BIRDWORLD_PAPER, BIRDWORLD_RECOMMENDED, PHOTOGRAPHS, PRESETS


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    name = tiny_clip.register(monkeypatch)

    def make(preset, **options):
        maker = getattr(tiny_photos, f"make_{preset}")
        root = maker(tmp_path / preset, monkeypatch) if preset == "eurosat" else maker(tmp_path / preset)
        return dealkit.preset(preset, pretrained=None, device="cpu", model=name, root=root, download=False, **options)
    return make


@pytest.mark.parametrize("name, batch_size", [("cub", 128), ("oxford_pets", 32), ("food101", 64), ("eurosat", 8)])
def test_what_belongs_together(tiny, name, batch_size):
    setup = tiny(name)
    assert setup.train.categories == setup.test.categories and set(setup.train.categories) == set(setup.bank)
    assert setup.train.transform is setup.vlm.preprocess and setup.validation is None
    assert setup.config == replace(PHOTOGRAPHS, batch_size=batch_size,
                                   gamma_localize=BIRDWORLD.gamma_localize * 100 / 16)  # a grid of 4 x 4, not 10 x 10
    assert setup.config.lr == 5e-7 and setup.config.epochs == 1                             # the paper's
    assert not set(setup.train.files) & set(setup.test.files)


def test_a_preset_trains_and_is_measured(tiny):
    setup = tiny("cub")
    config = replace(setup.config, batch_size=100)
    history = dealkit.finetune(setup.vlm, setup.train, setup.bank, config, progress=False)
    row = dealkit.evaluate(setup.vlm, setup.test, setup.bank, insertion_images=1)
    assert len(history) == 2 and row["n"] == len(setup.test) == 200
    for name in ("accuracy", "accuracy_by_concepts", "overlap_cosine", "insertion_fidelity", "point_hits"):
        assert 0 <= row[name] <= 1, name
    assert row[["pointing_game", "worst_group_accuracy"]].isna().all()                       # CUB has neither


def test_fresh_models_are_alike_and_apart(tiny):
    state = torch.random.get_rng_state()
    setup = tiny("cub")
    one, other = setup.fresh(), setup.fresh()
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b, c in zip(setup.vlm.model.parameters(), one.model.parameters(), other.model.parameters()):
        assert torch.equal(a, b) and torch.equal(b, c)
    next(one.model.parameters()).data.add_(1)
    assert not torch.equal(next(one.model.parameters()), next(other.model.parameters()))


def test_photographs_to_validate_on_are_held_out_when_asked_for(tiny):
    setup = tiny("eurosat", validation=0.1)
    assert not set(setup.train.files) & set(setup.validation.files)
    assert set(setup.validation.labels) == set(range(10)) and setup.validation.categories == setup.test.categories


def test_birdworld_is_drawn_at_the_size_that_the_model_takes():
    setup = dealkit.preset("birdworld", pretrained=None, device="cpu", model="birdworld-vit-224")
    assert setup.vlm.grid == (14, 14) and setup.test[0]["image"].shape == (3, 224, 224)
    assert setup.config == replace(BIRDWORLD, gamma_localize=BIRDWORLD.gamma_localize * 100 / 196)
    assert dealkit.preset("birdworld", device="cpu").config == BIRDWORLD
    assert dealkit.explain(setup.vlm, setup.test[0]["image"][None], ["red head"]).shape == (1, 1, 14, 14)


def test_birdworld_comes_with_a_resnet_too():
    setup = dealkit.preset("birdworld", device="cpu", model="birdworld-rn")
    assert setup.vlm.tower.family == "ModifiedResNet" and setup.vlm.grid == (5, 5)
    assert setup.train.size == setup.test.size == 160 and setup.test[0]["image"].shape == (3, 160, 160)
    assert setup.config == replace(BIRDWORLD, gamma_localize=BIRDWORLD.gamma_localize * 100 / 25)


def test_the_forms_of_birdworld_take_the_same_steps_and_differ_where_they_say():
    """So that a difference between two rows of a table is one of the objective: 2,400 birds, 100 steps."""
    for config in (BIRDWORLD, BIRDWORLD_RECOMMENDED, BIRDWORLD_PAPER, BIRDWORLD.contrastive_only):
        assert (config.lr, config.epochs, config.batch_size) == (1e-4, 1, 24)
    assert len(dealkit.preset("birdworld", device="cpu").train) == 100 * BIRDWORLD.batch_size
    assert BIRDWORLD == replace(BIRDWORLD_RECOMMENDED, swap=0.) != BIRDWORLD_RECOMMENDED
    assert (BIRDWORLD_PAPER.overlap, BIRDWORLD_PAPER.aggregate, BIRDWORLD_PAPER.guard) == ("product", "sum", 0.)
    assert not BIRDWORLD_PAPER.stop_text_gradient and BIRDWORLD_PAPER.swap == 0.


@pytest.mark.parametrize("name", ["imagenet", "waterbirds"])
def test_what_is_not_downloaded_has_to_be_given(name, monkeypatch):
    monkeypatch.setattr(presets, "load_model", lambda *_: pytest.fail("loads 605 MB before it says so"))
    with pytest.raises(ValueError, match=f"{name} is not downloaded: pass root"):
        dealkit.preset(name)


def test_waterbirds_has_its_own_validation_split_and_groups(monkeypatch, tmp_path):
    folder = tmp_path / "waterbird_complete95_forest2water2"
    rows = [(f"{split}{y}{place}.jpg", y, split, place) for split in range(3) for y in (0, 1) for place in (0, 1)]
    tiny_photos.write(folder / "metadata.csv", ["img_id,img_filename,y,split,place,place_filename"] + [
        f"{i},{name},{y},{split},{place},x.jpg" for i, (name, y, split, place) in enumerate(rows)])
    for name, *_ in rows:
        tiny_photos.save(folder / name, np.random.default_rng(0))
    setup = dealkit.preset("waterbirds", None, "cpu", tiny_clip.register(monkeypatch), tmp_path)
    assert [part.files[0] for part in (setup.train, setup.validation, setup.test)] == ["000.jpg", "100.jpg", "200.jpg"]
    row = dealkit.evaluate(setup.vlm, setup.test, setup.bank, insertion_images=0)
    assert 0 <= row["worst_group_accuracy"] <= row["accuracy"] and row["n"] == 4


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown preset 'cubs'.*'birdworld', 'clip', 'cub'"):
        dealkit.preset("cubs")
    assert set(BATCH_SIZES) < set(PRESETS)


def test_the_wrong_activation_is_refused_before_anything_is_fetched():
    """OpenAI's weights were trained with QuickGELU; open_clip itself only warns."""
    with pytest.raises(ValueError, match="trained with QuickGELU.*computes GELU.*ViT-B-32-quickgelu"):
        dealkit.preset("cub", model="ViT-B-32", device="cpu")
