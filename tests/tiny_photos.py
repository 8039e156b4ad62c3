"""Data sets in the formats in which they lie on a disk, with a few small pictures and all of their class names."""
from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image

import dealkit
from dealkit.datasets import listings, photos
from dealkit.datasets.fetch import Archive

CATS = ["Abyssinian", "Bengal", "Birman", "Bombay", "British_Shorthair", "Egyptian_Mau", "Maine_Coon", "Persian",
        "Ragdoll", "Russian_Blue", "Siamese", "Sphynx"]
PARTS = ["back", "beak", "belly", "breast", "crown", "forehead", "left eye", "left leg", "left wing", "nape",
         "right eye", "right leg", "right wing", "tail", "throat"]


def save(path: Path, rng: np.random.Generator, size=None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size or rng.integers(20, 60, 2)
    PIL.Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path, "JPEG")


def write(path: Path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def make_cub(root: Path) -> Path:
    """200 species with two pictures each, the first to train, the second to test; ids are not in the order of lines."""
    rng, base = np.random.default_rng(0), root / "CUB_200_2011"
    classes = [f"{i + 1:03d}.{name.replace(' ', '_')}" for i, name in enumerate(dealkit.load_concepts("cub"))]
    images = [f"{name}/{name[4:]}_{k:04d}_79.jpg" for name in classes for k in (1, 2)]
    for name in images:
        save(base / "images" / name, rng)
    write(base / "classes.txt", (f"{i} {name}" for i, name in enumerate(classes, 1)))
    write(base / "images.txt", reversed([f"{i} {name}" for i, name in enumerate(images, 1)]))
    write(base / "image_class_labels.txt", (f"{i} {(i + 1) // 2}" for i in range(1, 401)))
    write(base / "train_test_split.txt", (f"{i} {i % 2}" for i in range(1, 401)))
    write(base / "bounding_boxes.txt", (f"{i} 2.0 3.0 {10 + i % 5}.0 12.0" for i in range(1, 401)))
    write(base / "parts" / "parts.txt", (f"{i} {part}" for i, part in enumerate(PARTS, 1)))
    write(base / "parts" / "part_locs.txt",
          (f"{i} {part} {part + i % 3}.0 {part + 0.5} 1" if (i + part) % 4 else f"{i} {part} 0.0 0.0 0"
           for i in range(1, 401) for part in range(1, 16)))
    write(root / "attributes.txt", ["1 has_bill_shape::curved"])
    return root


def make_oxford_pets(root: Path) -> Path:
    rng = np.random.default_rng(1)
    classes = [name.replace(" ", "_") for name in dealkit.load_concepts("oxford_pets")]
    classes = [name if name in CATS else name.lower() for name in classes]
    for split, numbers in (("trainval", (1, 12)), ("test", (7,))):
        write(root / "annotations" / f"{split}.txt",
              (f"{name}_{k} {i} {1 if name in CATS else 2} 1" for i, name in enumerate(classes, 1) for k in numbers))
        for name in classes:
            for k in numbers:
                save(root / "images" / f"{name}_{k}.jpg", rng)
    write(root / "images" / "Abyssinian_100.mat", ["left behind in the archive"])
    return root


def make_food101(root: Path) -> Path:
    rng, base = np.random.default_rng(2), root / "food-101"
    classes = [name.replace(" ", "_") for name in dealkit.load_concepts("food101")]
    for split, numbers in (("train", ("1005", "17")), ("test", ("99",))):
        table = {name: [f"{name}/{k}" for k in numbers] for name in reversed(classes)}
        (base / "meta").mkdir(parents=True, exist_ok=True)
        (base / "meta" / f"{split}.json").write_text(json.dumps(table), encoding="utf-8")
        for pictures in table.values():
            for name in pictures:
                save(base / "images" / f"{name}.jpg", rng)
    return root


def make_eurosat(root: Path, monkeypatch, count=30) -> Path:
    """Only the first 30 pictures of each class; listings.EUROSAT says so too while the test runs."""
    rng = np.random.default_rng(3)
    monkeypatch.setattr(listings, "EUROSAT", dict.fromkeys(listings.EUROSAT, count))
    for name in listings.eurosat_names():
        save(root / "2750" / name, rng, (64, 64))
    return root


def pack(folder: Path, names, kind="gz") -> bytes:
    """Some of a folder's entries as a .tar.gz or a .zip."""
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            for path in sorted(path for name in names for path in (folder / name).rglob("*")):
                archive.write(path, path.relative_to(folder))
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
            for name in names:
                archive.add(folder / name, name)
    return buffer.getvalue()


def serve(name: str, packed: list[bytes], server, monkeypatch) -> None:
    """Let the data set come from a server of the test: same names, own checksums."""
    archives = []
    for archive, data in zip(photos.ARCHIVES[name], packed, strict=True):
        server.files[archive.name] = data
        archives.append(Archive((server.url(archive.name),), hashlib.sha256(data).hexdigest(), len(data), 1_000_000,
                                archive.top))
    monkeypatch.setitem(photos.ARCHIVES, name, tuple(archives))
