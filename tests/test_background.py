"""Reliance on the background: counterfactual birds pixel for pixel, and all columns by hand on a model that we know."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_birds import bird_vlm

from dealkit.datasets import Birdworld
from dealkit.datasets.painter import render
from dealkit.evaluation import background_reliance, background_table, uniform_maps
from dealkit.evaluation.background import mass_outside
from dealkit.maps import explain

EVERYTHING = ("flipped", "background_mass", "background_area", "twin_errors")


# ------------------------------------------------------------------------------------------------- the counterfactual


@pytest.mark.parametrize("options", [{"split": "test", "n": 64}, {"split": "train", "n": 16, "size": 160, "seed": 3},
                                     {"split": "train", "n": 40, "random_birds": 0.5}], ids=str)
def test_the_same_birds_stand_on_the_other_background(options):
    birds = Birdworld(**options)
    n = len(birds)
    other, there = birds.on_other_background(), Birdworld(**options).batch(range(n))
    here, now = birds.batch(range(n)), other.batch(range(n))             # the original first: no cache is shared
    assert (here["background"] + now["background"] == 1).all()
    for name in ("label", "attributes", "part_masks"):
        assert torch.equal(here[name], now[name]), name
    home = here["label"] >= 0
    assert torch.equal((here["group"] + now["group"])[home], 4 * (here["label"] % 2)[home] + 1)
    assert here["part_masks"].any(dim=(1, 2, 3)).all()
    same = (here["image"] == now["image"]).all(dim=1)                    # [n, H, W]
    assert same[here["part_masks"].any(dim=1)].all()
    assert 0.6 < 1 - same.float().mean() < 0.95                          # the rest is another ground
    assert torch.equal(birds.batch(range(n))["image"], there["image"])   # and the original is as it was
    again = other.on_other_background()
    assert np.array_equal(again.backgrounds, birds.backgrounds)
    assert torch.equal(again.batch(range(n))["image"], here["image"])
    assert other.categories == birds.categories and len(other) == n and other.size == birds.size


def test_nothing_but_the_ground_is_painted_anew():
    """By the painter's own layers: eyes, legs and distractors, which no part mask holds, stay as well."""
    birds = Birdworld("test", n=32)
    layers = render(0, "test", np.arange(32), birds.attributes, birds.backgrounds)[1]
    here, there = (world.batch(range(32))["image"] for world in (birds, birds.on_other_background()))
    assert {0, 1, 2, 3, 4, 5, 6, 7, 8} <= set(np.unique(layers))
    assert np.array_equal((here == there).all(dim=1).numpy(), layers != 0)


# -------------------------------------------------------------------------------------- the table, on a model we know


class Planned:
    """A model whose prediction for each bird is written down: a category on land, another one on water.

    Images are told apart by their number, which stands in the red channel; the background in the green one.
    """

    device, grid, image_size = torch.device("cpu"), (4, 4), (8, 8)

    def __init__(self, on_land, on_water):
        self.plans = torch.tensor([on_land, on_water])

    def encode_text(self, texts):
        return torch.eye(4)[[int(text.removeprefix("see ")) for text in texts]]

    def encode_image(self, images):
        number, ground = images[:, 0, 0, 0].round().long(), images[:, 1, 0, 0].round().long()
        return torch.eye(4)[self.plans[ground, number]]


class PlannedBirds(torch.utils.data.Dataset):
    categories = ["0", "1", "2", "3"]

    def __init__(self, labels, backgrounds):
        self.labels, self.backgrounds = labels, backgrounds

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        image = torch.zeros(3, 8, 8)
        image[0], image[1] = i, self.backgrounds[i]
        masks = torch.zeros(2, 8, 8, dtype=torch.bool)
        masks[0, :4, :4], masks[1, :2, :2] = True, True                  # overlap: together 16 of 64 pixels
        return {"image": image, "label": self.labels[i], "background": self.backgrounds[i], "part_masks": masks}

    def on_other_background(self):
        return PlannedBirds(self.labels, [1 - b for b in self.backgrounds])


LABELS, GROUNDS = [0, 1, 2, 3, 0], [0, 0, 1, 1, 0]
BIRDS = PlannedBirds(LABELS, GROUNDS)
#                  right, twin, right, another, another's twin
MODEL = Planned(on_land=[0, 0, 3, 0, 3], on_water=[1, 0, 2, 1, 3])


def part_maps(vlm, images, emb):
    """Mass only where the masks are: the first 2 x 2 of 4 x 4 places would spill over by interpolation, so finer."""
    maps = torch.zeros(len(images), 1, 8, 8)
    maps[..., :4, :4] = 1.0
    return maps


def test_every_column_by_hand():
    table = background_table(MODEL, BIRDS, part_maps, "see {}", batch_size=2)
    assert table["label"].tolist() == LABELS and table["background"].tolist() == GROUNDS
    assert table["predicted"].tolist() == [0, 0, 2, 1, 3] and table["predicted_other"].tolist() == [1, 0, 3, 0, 3]
    assert table["correct"].tolist() == [1, 0, 1, 0, 0] and table["flipped"].tolist() == [1, 0, 1, 1, 0]
    assert table["twin_error"].isna().tolist() == [True, False, True, False, False]
    assert table["twin_error"].dropna().tolist() == [1, 0, 0]            # 1 for 0; then 3 as 1, and 0 as 3
    assert table["background_mass"].tolist() == [0.0] * 5 and table["background_area"].tolist() == [0.75] * 5


def test_the_row_by_hand():
    row = background_reliance(MODEL, BIRDS, explainer=part_maps, category_prompt="see {}")
    assert row["flipped"] == pytest.approx(3 / 5) and row["twin_errors"] == pytest.approx(1 / 3)
    assert (row["background_mass"], row["background_area"]) == (0.0, 0.75)
    assert {name: value for name, value in row.items() if name.startswith("accuracy/")} == {
        "accuracy/0/land": 0.5, "accuracy/1/land": 0.0, "accuracy/2/water": 1.0, "accuracy/3/water": 0.0}
    for name in EVERYTHING:
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    assert row["flipped_low"] < row["flipped"] < row["flipped_high"]
    right = background_reliance(Planned([0, 1, 2, 3, 0], [0, 1, 2, 3, 0]), BIRDS, explainer=part_maps,
                                category_prompt="see {}")
    assert right["flipped"] == 0 and right[["twin_errors", "twin_errors_low", "twin_errors_high"]].isna().all()


def test_each_image_is_explained_with_its_own_category():
    seen = []

    def noted(vlm, images, emb):
        seen.append(emb.argmax(dim=-1).tolist())
        return part_maps(vlm, images, emb)
    background_table(MODEL, BIRDS, noted, "see {}", batch_size=3)
    assert seen == [[[0], [1], [2]], [[3], [0]]]


def test_true_masks_have_no_mass_outside_and_uniform_maps_have_the_area():
    birds, vlm = Birdworld("test", n=32), bird_vlm()
    masks = iter(birds.batch(range(32))["part_masks"].any(dim=1).float().split(16))
    table = background_table(vlm, birds, lambda vlm, images, emb: next(masks)[:, None], batch_size=16)
    assert (table["background_mass"] == 0).all() and table["background_area"].between(0.6, 0.99).all()
    blind = background_table(vlm, birds, uniform_maps)
    np.testing.assert_allclose(blind["background_mass"], blind["background_area"], rtol=1e-5)
    dead = background_table(vlm, birds, lambda vlm, images, emb: torch.zeros(len(images), 1, *vlm.grid))
    assert dead["background_mass"].isna().all()


def test_mass_outside_by_hand():
    maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]], [[0.0, 5.0], [0.0, 0.0]]])
    masks = torch.tensor([[[1, 0], [0, 0]], [[1, 1], [1, 1]], [[0, 1], [0, 1]]]).bool()
    shares = mass_outside(maps, masks)
    assert shares[[0, 2]].tolist() == pytest.approx([0.9, 0.0]) and shares[1].isnan()
    fine = torch.rand(2, 3, 3)
    full = F.interpolate(fine[:, None], size=(9, 9), mode="bilinear", align_corners=False)[:, 0]
    inside = torch.rand(2, 9, 9) < 0.4
    expected = [1 - float(m[i].sum() / m.sum()) for m, i in zip(full, inside)]
    assert mass_outside(fine, inside).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_towers_own_maps_and_the_models_own_predictions():
    """On a model of random weights, against the public functions; nothing of it changes."""
    vlm, birds = bird_vlm(), Birdworld("test", n=32)
    table = background_table(vlm, birds)
    batch, names = birds.batch(range(32)), [f"a photo of a {category}" for category in birds.categories]
    with torch.no_grad():
        texts = vlm.encode_text(names)
        predicted = [(vlm.encode_image(world.batch(range(32))["image"]) @ texts.T).argmax(1).tolist()
                     for world in (birds, birds.on_other_background())]
    assert [table["predicted"].tolist(), table["predicted_other"].tolist()] == predicted
    maps = explain(vlm, batch["image"], [[names[y]] for y in batch["label"]])[:, 0]
    expected = mass_outside(maps, batch["part_masks"].any(dim=1))
    np.testing.assert_allclose(table["background_mass"], expected, rtol=1e-4)
    assert all(p.grad is None and p.requires_grad for p in vlm.model.parameters())


def test_a_data_set_without_counterfactuals_is_named():
    with pytest.raises(TypeError, match=r"SimpleNamespace has no on_other_background\(\).*this needs Birdworld"):
        background_table(bird_vlm(), SimpleNamespace(categories=["a"]))


def test_birds_of_no_species_are_refused():
    with pytest.raises(ValueError, match="no category .label -1."):
        background_table(bird_vlm(), Birdworld("test", n=8, random_birds=1.0))
