"""Which pictures a data set has: its own files are read as they lie on the disk -> names, labels, points.

Formats: CUB-200-2011's README; torchvision's OxfordIIITPet, Food101 and EuroSAT; ILSVRC-2012 in a folder a synset, and
as Kaggle packs it; `metadata.csv` of Waterbirds (Sagawa et al. 2020).
"""
from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from dealkit.datasets.photo_set import in_random_order
from dealkit.paths import data_path

EUROSAT = {"AnnualCrop": 3000, "Forest": 3000, "HerbaceousVegetation": 3000, "Highway": 2500, "Industrial": 2500,
           "Pasture": 2000, "PermanentCrop": 2500, "Residential": 3000, "River": 2500, "SeaLake": 3000}
WATERBIRDS = ("landbird", "waterbird")
GROUNDS = ("land", "water")
# ImageNet has two pairs of classes of one name in open_clip's list; the bank tells them apart.
_RENAMED = {744: "missile (projectile)", 836: "sunglasses (sunglass)"}


def rows(path: Path, *kinds: Callable) -> list[list]:
    """The lines of a text file, split at blanks (the last field may hold some) and converted.

    Raises:
        FileNotFoundError: no such file. ValueError: a line of another form. Both name it.
    """
    found = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            try:
                found.append([kind(word) for kind, word in zip(kinds, line.split(None, len(kinds) - 1), strict=True)])
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {line.strip()!r} is not of the form of this data set; unpack "
                                 "it again.") from error
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: the data set is not whole, or this is not its folder. Delete the "
                                "folder and fetch it again, or pass the right root.") from error


def cub(root: Path, split: str) -> dict:
    """CUB-200-2011: what `PhotoSet` wants, with points and boxes."""
    inside = {number for number, train in rows(root / "train_test_split.txt", int, int) if train == (split == "train")}
    files = {number: file for number, file in rows(root / "images.txt", int, str.strip) if number in inside}
    labels, boxes = dict(rows(root / "image_class_labels.txt", int, int)), _by_image(root / "bounding_boxes.txt", 4)
    parts = [name for _, name in sorted(rows(root / "parts" / "parts.txt", int, str.strip))]
    points = _points(root / "parts" / "part_locs.txt", files, len(parts))
    categories = [words(name) for _, name in sorted(rows(root / "classes.txt", int, str.strip))]
    numbers = sorted(files)
    return {"root": root / "images", "files": [files[i] for i in numbers], "labels": [labels[i] - 1 for i in numbers],
            "categories": categories, "parts": parts, "points": points[numbers],
            "boxes": np.array([boxes[i] for i in numbers])}


def _points(path: Path, numbers: Collection[int], parts: int) -> np.ndarray:
    """`[highest number + 1, parts, 2]`: x and y, NaN where invisible. By NumPy, for the file has 176,820 lines."""
    try:
        table = np.loadtxt(_text(path).splitlines(), ndmin=2)
        number, part = table[:, :2].astype(int).T
        x, y, visible = table[:, 2:].T
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is damaged ({error}); unpack the data set again.") from error
    points = np.full((max(numbers, default=0) + 1, parts, 2), np.nan)
    seen = (visible != 0) & np.isin(number, list(numbers))
    points[number[seen], part[seen] - 1] = np.stack([x, y], axis=1)[seen]
    return points


def _by_image(path: Path, count: int) -> dict[int, list[float]]:
    return {number: values for number, *values in rows(path, int, *[float] * count)}


def words(class_name: str) -> str:
    """A class name as the banks write it: no number in front, blanks for underscores, CamelCase taken apart."""
    name = re.sub(r"^\d+\.", "", class_name).replace("_", " ").strip()
    return name if " " in name else re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)


def oxford_pets(root: Path, split: str) -> dict:
    """Oxford-IIIT Pets: the picture american_bulldog_1 is of the class American Bulldog."""
    listed = rows(root / "annotations" / f"{'trainval' if split == 'train' else split}.txt", str, int, int, int)
    breeds = {label: name.rpartition("_")[0] for name, label, _, _ in listed}
    if sorted(breeds) != list(range(1, len(breeds) + 1)):
        raise ValueError(f"the classes in {root / 'annotations'} are numbered {sorted(breeds)}; expected 1, 2, 3, ... "
                         "Unpack the data set again.")
    return {"root": root / "images", "files": [f"{name}.jpg" for name, *_ in listed],
            "labels": [label - 1 for _, label, _, _ in listed],
            "categories": [" ".join(word.title() for word in breeds[label].split("_")) for label in sorted(breeds)]}


def food101(root: Path, split: str) -> dict:
    """Food-101: meta/train.json and test.json, class -> pictures."""
    path = root / "meta" / f"{split}.json"
    try:
        table = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); delete the folder and fetch it again.") from error
    classes = sorted(table)
    pairs = [(f"{picture}.jpg", label) for label, name in enumerate(classes) for picture in table[name]]
    return {"root": root / "images", "files": [file for file, _ in pairs], "labels": [label for _, label in pairs],
            "categories": [words(name) for name in classes]}


def eurosat(root: Path, split: str) -> dict:
    """EuroSAT: every name is known beforehand, and data/eurosat_split.json says which are for the test."""
    held = json.loads(data_path("eurosat_split.json").read_text(encoding="utf-8"))["test"]
    test = {f"{name}/{name}_{number}.jpg" for name, numbers in held.items() for number in numbers}
    names = eurosat_names()
    there = {f"{name}/{path.name}" for name in EUROSAT if (root / name).is_dir() for path in (root / name).iterdir()}
    gone = [name for name in names if name not in there]
    if gone:
        raise FileNotFoundError(f"{len(gone):,} of EuroSAT's {len(names):,} pictures are not in {root}, {gone[0]} for "
                                "one; delete the folder and fetch it again, or pass the right root.")
    files, classes = [name for name in names if (name in test) == (split == "test")], list(EUROSAT)
    return {"root": root, "files": files, "labels": [classes.index(file.partition("/")[0]) for file in files],
            "categories": [words(name) for name in classes]}


def eurosat_names() -> list[str]:
    return [f"{name}/{name}_{number}.jpg" for name, count in EUROSAT.items() for number in range(1, count + 1)]


def eurosat_split(seed: int = 0, count: int = 3000) -> dict[str, list[int]]:
    """The test pictures of our split, drawn at random from all, as the paper says of its own: class -> numbers."""
    test = set(in_random_order(eurosat_names(), seed)[:count])
    return {name: [number for number in range(1, size + 1) if f"{name}/{name}_{number}.jpg" in test]
            for name, size in EUROSAT.items()}


def imagenet(root: Path, split: str) -> dict:
    """ImageNet 2012: a folder a synset, or a flat folder with the LOC_val_solution.csv of Kaggle."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES  # in the order of the synsets
    from timm.data import ImageNetInfo

    synsets = ImageNetInfo().label_names()
    folders = [base / split for base in (root, root / "ILSVRC" / "Data" / "CLS-LOC") if (base / split).is_dir()]
    if not folders:
        raise FileNotFoundError(f"there is no folder {split!r} in {root} (nor in ILSVRC/Data/CLS-LOC there); expected "
                                "ImageNet's synsets in it, such as n01440764.")
    pairs = _of_synsets(folders[0], synsets) or _of_solution(folders[0], root / f"LOC_{split}_solution.csv", synsets)
    return {"root": folders[0], "files": [file for file, _ in pairs], "labels": [label for _, label in pairs],
            "categories": [_RENAMED.get(i, name) for i, name in enumerate(IMAGENET_CLASSNAMES)]}


def _of_synsets(folder: Path, synsets: list[str]) -> list[tuple[str, int]]:
    there = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if not there:
        return []
    gone, more = sorted(set(synsets) - there), sorted(there - set(synsets))
    if gone or more:
        raise ValueError(f"{folder} has not the 1,000 synsets of ImageNet 2012: {len(gone)} are missing "
                         f"{gone[:3]}, {len(more)} are others {more[:3]}. Complete it, or use photos.folder.")
    pairs = [(f"{synset}/{path.name}", label) for label, synset in enumerate(synsets)
             for path in sorted((folder / synset).iterdir()) if path.suffix.lower() in (".jpeg", ".jpg")]
    empty = set(range(len(synsets))) - {label for _, label in pairs}
    if empty:
        raise ValueError(f"{len(empty)} synsets in {folder} are empty, {synsets[min(empty)]} for one; unpack them "
                         "again.")
    return pairs


def _of_solution(folder: Path, table: Path, synsets: list[str]) -> list[tuple[str, int]]:
    if not table.exists():
        raise FileNotFoundError(f"{folder} has no folders of synsets, and there is no {table} to say what its pictures "
                                "show. Sort them into folders such as n01440764, or put Kaggle's table there.")
    number = {synset: label for label, synset in enumerate(synsets)}
    with table.open(encoding="utf-8", newline="") as file:
        return sorted((f"{row['ImageId']}.JPEG", number[row["PredictionString"].split()[0]])
                      for row in csv.DictReader(file))


def waterbirds(root: Path, split: str) -> dict:
    """Waterbirds: metadata.csv with the columns img_filename, y, split (0, 1, 2), place."""
    number = str(("train", "validation", "test").index(split))
    found = [row for row in csv.DictReader(_text(root / "metadata.csv").splitlines()) if row["split"] == number]
    labels, places = ([int(row[name]) for row in found] for name in ("y", "place"))
    return {"root": root, "files": [row["img_filename"] for row in found], "labels": labels,
            "categories": list(WATERBIRDS), "columns": {"group": [2 * y + place for y, place in zip(labels, places)],
                                                        "background": places}}
