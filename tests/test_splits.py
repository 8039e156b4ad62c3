"""Splits that are ours: EuroSAT's, written down, and validation images held out of a training split."""
from __future__ import annotations

import hashlib
import json
import runpy
from collections import Counter

import numpy as np
import pytest
import tiny_photos
import torch
import torchvision.transforms as v1

from dealkit.datasets import Birdworld, PhotoSet, balance, hold_out, listings, photos
from dealkit.paths import data_path

TENSOR = v1.ToTensor()


# EuroSAT's split

def test_eurosats_split_is_written_down_and_can_be_made_again(tmp_path, monkeypatch):
    written = json.loads(data_path("eurosat_split.json").read_text(encoding="utf-8"))
    assert written["test"] == listings.eurosat_split(written["seed"])
    names = [f"{name}/{name}_{i + 1}.jpg" for name, count in listings.EUROSAT.items() for i in range(count)]
    hashes = {name: hashlib.sha256(f"0 {name}".encode()).hexdigest() for name in names}
    held = {f"{name}/{name}_{i}.jpg" for name, numbers in written["test"].items() for i in numbers}
    assert len(names) == len(set(names)) == 27_000 and len(held) == 3_000
    assert max(hashes[name] for name in held) < min(hashes[name] for name in names if name not in held)
    assert listings.eurosat_split(1) != written["test"]
    before = data_path("eurosat_split.json").read_bytes()
    script = data_path("eurosat_split.py")
    monkeypatch.setattr("dealkit.paths.data_path", lambda *parts, must_exist=True: tmp_path.joinpath(*parts))
    runpy.run_path(str(script), run_name="__main__")
    assert (tmp_path / "eurosat_split.json").read_bytes() == before


def test_eurosat_is_split_as_it_is_written(tmp_path, monkeypatch):
    root = tiny_photos.make_eurosat(tmp_path, monkeypatch)
    written = json.loads(data_path("eurosat_split.json").read_text(encoding="utf-8"))["test"]
    train, test = (photos.eurosat(split, TENSOR, root) for split in ("train", "test"))
    wanted = {f"{name}/{name}_{i}.jpg" for name, numbers in written.items() for i in numbers if i <= 30}
    assert set(test.files) == wanted and len(train) + len(test) == 300 and len(test) < 60


def test_eurosat_must_be_whole(tmp_path, monkeypatch):
    root = tiny_photos.make_eurosat(tmp_path, monkeypatch)
    (root / "2750" / "Forest" / "Forest_7.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="1 of EuroSAT's 300 pictures .*Forest/Forest_7.jpg"):
        photos.eurosat("train", TENSOR, root)


# A validation split

def test_hold_out_takes_the_same_share_of_every_category(tmp_path):
    food = photos.food101("train", TENSOR, tiny_photos.make_food101(tmp_path))
    train, held = hold_out(food, 0.5, seed=3)
    assert train.categories == held.categories == food.categories and held.parts == []
    assert sorted(train.indices + held.indices) == list(range(202)) and len(held) == 101
    assert sorted(held.labels) == list(range(101)) and held.files == [food.files[i] for i in held.indices]
    assert torch.equal(held[5]["image"], food[held.indices[5]]["image"]) and held[5]["label"] == held.labels[5]
    assert hold_out(food, 0.5, seed=3)[1].indices == held.indices != hold_out(food, 0.5, seed=4)[1].indices
    birds = Birdworld("train", n=320)
    train, held = hold_out(birds, 0.1)
    assert held.backgrounds == [item["background"] for item in held]
    assert np.bincount(held.labels).tolist() == [2] * 16 and train.concept_options == Birdworld.concept_options
    again, both = hold_out(train, 0.1)                                # of a part of a part
    assert both.labels == [birds.labels[train.indices[i]] for i in both.indices] and len(again) + len(both) == 288


def test_hold_out_leaves_something_on_both_sides(tmp_path):
    dataset = torch.utils.data.TensorDataset(torch.zeros(7))
    with pytest.raises(ValueError, match="has no labels"):
        hold_out(dataset)
    dataset.labels, dataset.categories = [0, 0, 0, 1, 1, 2, 0], ["a", "b", "c"]
    for share, count in ((0.01, 2), (0.5, 3), (0.99, 4)):
        train, held = hold_out(dataset, share)
        assert len(held) == count and set(train.labels) == {0, 1, 2} and set(held.labels) == {0, 1}
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="share"):
            hold_out(dataset, share)
    dataset.labels = list(range(7))
    with pytest.raises(ValueError, match="one image only"):
        hold_out(dataset)


# A training set in which every group is as frequent

def counts(values) -> list[int]:
    return sorted(Counter(values).values())


def test_balance_makes_species_and_backgrounds_independent():
    birds = Birdworld("train", n=640)
    assert np.mean(birds.backgrounds == birds.labels % 2) > 0.9
    balanced = balance(birds)
    pairs = Counter(zip(balanced.labels, balanced.backgrounds))
    groups = {*zip(birds.labels.tolist(), birds.backgrounds.tolist())}
    assert pairs.keys() == groups and set(pairs.values()) == {round(640 / len(groups))}
    assert balanced.categories == birds.categories and abs(len(balanced) - 640) < len(groups)
    assert np.mean(np.array(balanced.backgrounds) == np.array(balanced.labels) % 2) == pytest.approx(16 / len(groups))
    for place in (0, len(balanced) - 1):                                 # what it says of an item is what the item is
        item = balanced[place]
        assert (item["label"], item["background"]) == (balanced.labels[place], balanced.backgrounds[place])
        assert torch.equal(item["image"], birds[balanced.indices[place]]["image"])


@pytest.fixture
def twelve():
    """12 items of no labels; their groups: 8 of "a", 3 of "b", 1 of "c"."""
    return torch.utils.data.TensorDataset(torch.arange(12)), list("aaaabaabaacb")


def test_small_groups_are_repeated_evenly_and_large_ones_drawn_without_repeats(twelve):
    dataset, groups = twelve
    balanced = balance(dataset, groups)
    drawn = Counter(balanced.indices)
    assert Counter(groups[i] for i in balanced.indices) == {"a": 4, "b": 4, "c": 4} and len(balanced) == 12
    assert [drawn[10]] == [4] and counts(i for i in balanced.indices if groups[i] == "b") == [1, 1, 2]
    assert counts(i for i in balanced.indices if groups[i] == "a") == [1, 1, 1, 1]
    assert [item.item() for item, in balanced] == balanced.indices == sorted(balanced.indices)
    assert balance(dataset, groups).indices == balanced.indices != balance(dataset, groups, seed=1).indices
    seen = {i for seed in range(40) for i in balance(dataset, groups, seed).indices}
    assert seen == set(range(12))                                        # nobody is left out for good


@pytest.mark.parametrize("make", [np.array, torch.tensor, tuple])
def test_groups_come_in_any_form(twelve, make):
    dataset, groups = twelve
    numbers = ["abc".index(group) for group in groups]
    assert balance(dataset, make(numbers)).indices == balance(dataset, groups).indices


def test_a_group_without_an_item_stays_without():
    """With a correlation of 1 no land bird was ever seen on water: the draw leaves that as it is."""
    birds = Birdworld("train", n=160, correlation=1.0)
    balanced = balance(birds, seed=3)
    assert len(balanced) == 160 and counts(balanced.labels) == [10] * 16
    assert np.array_equal(np.array(balanced.backgrounds), np.array(balanced.labels) % 2)


def test_photographs_with_backgrounds_can_be_balanced_and_others_need_groups(tmp_path):
    columns = {"background": [0, 0, 0, 1, 1, 1, 1, 1]}
    photographs = PhotoSet("p", tmp_path, [f"{i}.png" for i in range(8)], [0] * 4 + [1] * 4, ["a", "b"], TENSOR,
                           columns=columns)
    assert photographs.backgrounds == columns["background"]
    balanced = balance(photographs)                                      # three groups of 3, 1 and 4
    assert Counter(zip(balanced.labels, balanced.backgrounds)) == {(0, 0): 3, (0, 1): 3, (1, 1): 3}
    assert balanced.files == [photographs.files[i] for i in balanced.indices]
    plain = PhotoSet("p", tmp_path, ["0.png"], [0], ["a"], TENSOR)
    with pytest.raises(ValueError, match="PhotoSet has no backgrounds to balance; pass groups"):
        balance(plain)
    with pytest.raises(ValueError, match="there are 2 groups for 1 items; expected one for each"):
        balance(plain, [0, 1])
