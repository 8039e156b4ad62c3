"""Data sets of photographs in their own formats: lists, labels, names, points, and what is wrong with a folder."""
from __future__ import annotations

import pickle
import re
import shutil

import numpy as np
import PIL.Image
import pytest
import tiny_photos
import torch
import torchvision.datasets as theirs
import torchvision.transforms as v1
from file_server import FileServer
from test_geometry import preprocess
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

import dealkit
from dealkit.concepts import category_name
from dealkit.datasets import hold_out, listings, photos
from dealkit.paths import data_path

TOPS = {"cub": [["CUB_200_2011", "attributes.txt"]], "oxford_pets": [["images"], ["annotations"]],
        "food101": [["food-101"]], "eurosat": [["2750"]]}
COUNTS = {"cub": (200, 200), "oxford_pets": (74, 37), "food101": (202, 101)}
TENSOR = v1.ToTensor()
each_set = pytest.mark.parametrize("name", TOPS)


@pytest.fixture
def make(monkeypatch):
    """Function: write a data set in its own format."""
    return {"cub": tiny_photos.make_cub, "oxford_pets": tiny_photos.make_oxford_pets,
            "food101": tiny_photos.make_food101, "eurosat": lambda root: tiny_photos.make_eurosat(root, monkeypatch)}


def stored(dataset, index) -> torch.Tensor:
    """A picture as it lies on the disk, by PIL alone."""
    return pil_to_tensor(PIL.Image.open(dataset.root / dataset.files[index]).convert("RGB")) / 255


# What they hold

@each_set
def test_from_the_internet_to_an_item(name, make, tmp_path, monkeypatch):
    made = make[name](tmp_path / "made")
    monkeypatch.setenv("DEALKIT_DATA", str(tmp_path / "cache"))
    packed = [tiny_photos.pack(made, names, "zip" if name == "eurosat" else "gz") for names in TOPS[name]]
    with FileServer({}, breaks=[5_000]) as server:                    # every one of them breaks off once
        tiny_photos.serve(name, packed, server, monkeypatch)
        train = getattr(photos, name)("train", TENSOR)
        assert len(server.asked) == len(packed) + 1
    test = getattr(photos, name)("test", TENSOR)                      # the server is gone
    assert train.categories == test.categories == dealkit.load_concepts(name).categories
    assert train.name == name and train.root.is_relative_to(tmp_path / "cache")
    assert not set(train.files) & set(test.files)
    if name in COUNTS:
        assert (len(train), len(test)) == COUNTS[name]
    for dataset in (train, test):
        assert set(dataset.labels) == set(range(len(dataset.categories)))
        for index in (0, 7, len(dataset) - 1, -2):
            item = dataset[index]
            assert torch.equal(item["image"], stored(dataset, index)) and item["label"] == dataset.labels[index]
            folder = dataset.files[index].partition("/")[0] if name != "oxford_pets" else re.sub(
                r"_\d+\.jpg", "", dataset.files[index])
            assert category_name(folder).casefold() == dataset.categories[item["label"]].casefold()
    with pytest.raises(IndexError):
        test[len(test)]


@pytest.mark.parametrize("name", ["oxford_pets", "food101", "eurosat"])      # torchvision has no CUB
def test_torchvision_reads_the_same(name, make, tmp_path):
    """The same pictures with the same labels and (but for the spelling) names."""
    made = make[name](tmp_path)
    if name == "eurosat":
        (tmp_path / "eurosat").mkdir()
        shutil.move(made / "2750", tmp_path / "eurosat" / "2750")
        whole = theirs.EuroSAT(tmp_path)
        expected = {"all": [(path, label) for path, label in whole.samples]}
        ours = {"all": [pair for split in ("train", "test") for pair in pairs(photos.eurosat(split, TENSOR, tmp_path))]}
        assert [category_name(name) for name in whole.classes] == photos.eurosat("test", TENSOR, tmp_path).categories
    elif name == "food101":
        sets = {split: theirs.Food101(tmp_path, split) for split in ("train", "test")}
        expected = {split: list(zip(map(str, one._image_files), one._labels)) for split, one in sets.items()}
        ours = {split: pairs(photos.food101(split, TENSOR, tmp_path)) for split in sets}
        assert [category_name(name) for name in sets["test"].classes] == dealkit.load_concepts(name).categories
    else:
        (tmp_path / "oxford-iiit-pet").mkdir()
        for part in ("images", "annotations"):
            shutil.move(made / part, tmp_path / "oxford-iiit-pet" / part)
        sets = {"train": theirs.OxfordIIITPet(tmp_path, "trainval"), "test": theirs.OxfordIIITPet(tmp_path, "test")}
        expected = {split: list(zip(map(str, one._images), one._labels)) for split, one in sets.items()}
        ours = {split: pairs(photos.oxford_pets(split, TENSOR, tmp_path)) for split in sets}
        assert sets["test"].classes == dealkit.load_concepts(name).categories
    for split, wanted in expected.items():
        assert sorted(ours[split]) == sorted(wanted) and len(wanted) > 30


def pairs(dataset) -> list[tuple[str, int]]:
    return [(str(dataset.root / file), label) for file, label in zip(dataset.files, dataset.labels)]


def test_the_table_of_addresses_is_torchvisions_where_it_has_one():
    assert [archive.urls[0] for archive in photos.ARCHIVES["oxford_pets"]] == [
        address for address, _ in theirs.OxfordIIITPet._RESOURCES]
    assert theirs.Food101._URL in photos.ARCHIVES["food101"][0].urls
    for name, archives in photos.ARCHIVES.items():
        assert name in TOPS and len(archives) == len(TOPS[name])
        for archive in archives:
            assert re.fullmatch("[0-9a-f]{64}", archive.sha256) and archive.unpacked > archive.size * 0.9
            assert archive.sha256 in data_path("SOURCES.md").read_text(encoding="utf-8")
            assert all(url.rpartition("/")[2] == archive.name for url in archive.urls)


@each_set
def test_a_folder_that_one_has(name, make, tmp_path, monkeypatch):
    """root is the data set's folder or the one that it is in; nothing is asked of the network."""
    made, load = make[name](tmp_path / "made"), getattr(photos, name)
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("the network was asked"))
    inner = made if name == "oxford_pets" else made / TOPS[name][0][0]
    assert load("test", TENSOR, made).files == load("test", TENSOR, str(inner), download=False).files
    with pytest.raises(FileNotFoundError, match=f"{name} is not in .*download is False.*By hand: download https"):
        load("test", TENSOR, tmp_path / "empty", download=False)
    for split in ("val", "Train", "", None):
        with pytest.raises(ValueError, match=f"unknown split .* of {name}; choose one of train, test"):
            load(split, TENSOR, made)
    with pytest.raises(TypeError, match="vlm.preprocess"):
        load("test", None, made)


# CUB's points

def test_cub_has_points_and_boxes(tmp_path):
    birds = photos.cub("test", TENSOR, tiny_photos.make_cub(tmp_path))
    assert birds.parts == tiny_photos.PARTS
    for index in (0, 1, 150):
        number, item = 2 * (index + 1), birds[index]                  # the even ids are the test
        size = item["image"].shape
        assert item["part_points"].dtype == item["box"].dtype == torch.float32
        for part in range(1, 16):
            x, y = item["part_points"][part - 1].tolist()
            expected = (part + number % 3, part + 0.5)
            visible = (number + part) % 4 and expected[0] < size[2] and expected[1] < size[1]
            assert (x, y) == expected if visible else np.isnan([x, y]).all()
        box = item["box"].tolist()
        assert box == [2, 3, min(10 + number % 5, size[2] - 2), min(12, size[1] - 3)]


def test_cubs_points_follow_the_transform(tmp_path):
    """Each part is painted into its picture; where the point says it is now, there is the paint."""
    tiny_photos.make_cub(tmp_path)
    folder = tmp_path / "CUB_200_2011"
    for number in (2, 4):
        lines = [f"{number} {part} {x}.0 {y}.0 1" for part, x, y in ((1, 60, 40), (2, 90, 20), (3, 4, 50))]
        tiny_photos.write(folder / "parts" / "part_locs.txt", lines)
        name = next(file for i, file in listings.rows(folder / "images.txt", int, str.strip) if i == number)
        picture = np.zeros((80, 120, 3), np.uint8)
        for channel, (x, y) in enumerate(((60, 40), (90, 20), (4, 50))):
            picture[y - 3:y + 3, x - 3:x + 3, channel] = 255
        PIL.Image.fromarray(picture).save(folder / "images" / name, "JPEG", quality=100, subsampling=0)
        item = photos.cub("test", preprocess(64, mean=(0, 0, 0), std=(1, 1, 1)), tmp_path)[number // 2 - 1]
        points = item["part_points"]
        assert points.isnan().any(dim=1).tolist() == [False, False] + [True] * 13, "the third is cropped away"
        for channel, (x, y) in enumerate(points[:2].tolist()):
            where = item["image"][channel].argmax().item()
            assert abs(where % 64 + 0.5 - x) < 2.6 and abs(where // 64 + 0.5 - y) < 2.6
            assert item["image"][channel, int(y), int(x)] > 0.8


def test_transforms_that_points_cannot_follow(tmp_path):
    root, flip = tiny_photos.make_cub(tmp_path), v1.Compose([v1.RandomHorizontalFlip(), TENSOR])
    with pytest.raises(ValueError, match="RandomHorizontalFlip .*points=False"):
        photos.cub("train", flip, root)
    plain = photos.cub("train", flip, root, points=False)
    assert plain.parts == [] and set(plain[0]) == {"image", "label"}


def test_the_evaluations_metrics_take_cubs_points(tmp_path):
    birds = photos.cub("test", preprocess(32), tiny_photos.make_cub(tmp_path))
    batch = next(iter(DataLoader(birds, 4)))
    assert batch["image"].shape == (4, 3, 32, 32) and batch["part_points"].shape == (4, 15, 2)
    masks = dealkit.metrics.point_masks(batch["part_points"], (32, 32))
    assert (masks.flatten(2).any(dim=2) == ~batch["part_points"].isnan().any(dim=2)).all()


# Lists that are not whole

def test_lists_that_are_damaged_are_said(tmp_path):
    folder = tiny_photos.make_cub(tmp_path) / "CUB_200_2011"
    labels = folder / "image_class_labels.txt"
    kept = labels.read_text()
    labels.write_text(kept + "401 what\n")
    with pytest.raises(ValueError, match="image_class_labels.txt, line 401: '401 what'"):
        photos.cub("test", TENSOR, tmp_path)
    labels.write_text(kept[:kept.index("350 ")])
    with pytest.raises(ValueError, match="not whole or do not agree .KeyError: 350"):
        photos.cub("test", TENSOR, tmp_path)
    labels.write_text(kept)
    points = folder / "parts" / "part_locs.txt"
    points.write_text(points.read_text() + "1 2 what\n")
    with pytest.raises(ValueError, match="part_locs.txt is damaged"):
        photos.cub("test", TENSOR, tmp_path)
    labels.unlink()
    with pytest.raises(FileNotFoundError, match="image_class_labels.txt is missing"):
        photos.cub("test", TENSOR, tmp_path)


def test_damaged_and_missing_pictures_are_named(tmp_path):
    pets = photos.oxford_pets("test", TENSOR, tiny_photos.make_oxford_pets(tmp_path))
    path = pets.root / pets.files[3]
    for data, said in ((path.read_bytes()[:-100], "truncated"), (b"hello", "UnidentifiedImageError"), (b"", "Unident")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} cannot be read as a picture .*{said}"):
            pets[3]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(path))} is missing"):
        pets[3]
    assert pets[4]["label"] == 4


def test_a_damaged_table_is_named(tmp_path):
    root = tiny_photos.make_food101(tmp_path)
    (root / "food-101" / "meta" / "test.json").write_text('{"apple_pie": [')
    with pytest.raises(ValueError, match="test.json is damaged"):
        photos.food101("test", TENSOR, root)


# Workers

def test_workers_and_pickles(tmp_path):
    birds = photos.cub("test", preprocess(16), tiny_photos.make_cub(tmp_path))
    birds.labels = [label // 2 for label in birds.labels]
    for dataset in (birds, hold_out(birds, 0.5)[0]):
        batches = list(DataLoader(dataset, 50, num_workers=2))
        assert torch.cat([batch["label"] for batch in batches]).tolist() == list(dataset.labels)
        assert torch.equal(batches[0]["image"][3], dataset[3]["image"])
    assert torch.equal(pickle.loads(pickle.dumps(birds))[9]["part_points"].nan_to_num(),
                       birds[9]["part_points"].nan_to_num())
    assert "200 images, 200 categories" in repr(birds)
