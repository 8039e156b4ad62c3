"""Data sets of photographs: the paper's five, Waterbirds, and a folder of one's own.

Each function returns a `PhotoSet`: items are dicts with `image` [3, H, W] and `label`, `categories` are the names of
the concept bank of the same name (`dealkit.load_concepts("cub")`), in the order of the labels. What can be downloaded
is, once, into `DEALKIT_DATA` (or the system's cache folder): see `fetch`. Sources, checksums, terms: data/SOURCES.md.
"""
from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from dealkit.datasets import listings
from dealkit.datasets.fetch import Archive, cache_folder, fetch
from dealkit.datasets.photo_set import PhotoSet, Selection, Transform, hold_out

__all__ = ["ARCHIVES", "PhotoSet", "Selection", "cache_folder", "cub", "eurosat", "folder", "food101", "hold_out",
           "imagenet", "oxford_pets", "waterbirds"]

_TORCHGEO = "https://huggingface.co/datasets/torchgeo/eurosat"       # where torchvision fetches it
# What `unpacked` says is an estimate from above, with the waste of small files on a disk.
ARCHIVES = {
    "cub": (Archive(("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",),
                    "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
                    1_150_585_339, 1_300_000_000, "CUB_200_2011"),),
    "oxford_pets": (Archive(("https://www.robots.ox.ac.uk/~vgg/data/pets/data/images.tar.gz",
                             "https://thor.robots.ox.ac.uk/datasets/pets/images.tar.gz"),
                            "67195c5e1c01f1ab5f9b6a5d22b8c27a580d896ece458917e61d459337fa318d",
                            791_918_971, 850_000_000, "images"),
                    Archive(("https://www.robots.ox.ac.uk/~vgg/data/pets/data/annotations.tar.gz",
                             "https://thor.robots.ox.ac.uk/datasets/pets/annotations.tar.gz"),
                            "52425fb6de5c424942b7626b428656fcbd798db970a937df61750c0f1d358e91",
                            19_173_078, 150_000_000, "annotations")),
    "food101": (Archive(("https://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
                         "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz"),
                        "d97d15e438b7f4498f96086a4f7e2fa42a32f2712e87d3295441b2b6314053a4",
                        4_996_278_331, 5_500_000_000, "food-101"),),
    "eurosat": (Archive((f"{_TORCHGEO}/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
                         "https://madm.dfki.de/files/sentinel/EuroSAT.zip"),
                        "8ebea626349354c5328b142b96d0430e647051f26efc2dc974c843f25ecf70bd",
                        94_280_567, 200_000_000, "2750"),),
}
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_SYSTEM = ("thumbs.db", "desktop.ini")              # what systems put into folders of pictures; so are names with a dot


def cub(split: str, transform: Transform, root: str | Path | None = None, download: bool = True,
        points: bool = True) -> PhotoSet:
    """CUB-200-2011: 5,994 and 5,794 birds of 200 species, with 15 part points and a box each (1.15 GB).

    Items also have `part_points` [15, 2], (x, y) in pixels of the transformed image (its top left corner is (0, 0)),
    NaN where a part is invisible or cropped away, and `box` [4] (x, y, width, height), what of it is in the image.

    Args:
        split: "train" or "test", the official ones.
        transform: PIL picture -> tensor [3, H, W]; `vlm.preprocess`.
        root: the folder CUB_200_2011 or the one that it is in, or shall be put into; None is the cache folder.
        download: fetch it where it is missing.
        points: False leaves points and boxes out, for transforms that they cannot follow (see `geometry`).

    Returns:
        `PhotoSet` with .categories and .parts ("back", "beak", ...).

    Raises:
        ValueError: unknown split, a transform that points cannot follow, a wrong checksum, a damaged list.
        ConnectionError, FileNotFoundError, OSError: it cannot be fetched, is not there, or does not fit: see `fetch`.
    """
    found = _read("cub", split, root, download, listings.cub, ("CUB_200_2011",), ("images.txt",))
    if not points:
        found |= {"points": None, "boxes": None}
    return PhotoSet("cub", transform=transform, **found)


def oxford_pets(split: str, transform: Transform, root: str | Path | None = None, download: bool = True) -> PhotoSet:
    """Oxford-IIIT Pets: 3,680 and 3,669 cats and dogs of 37 breeds (0.81 GB); "train" is its trainval list.

    Args, Returns, Raises: as `cub`; root holds `images` and `annotations`, or torchvision's folder oxford-iiit-pet.
    """
    found = _read("oxford_pets", split, root, download, listings.oxford_pets, ("", "oxford-iiit-pet"),
                  ("images", "annotations"))
    return PhotoSet("oxford_pets", transform=transform, **found)


def food101(split: str, transform: Transform, root: str | Path | None = None, download: bool = True) -> PhotoSet:
    """Food-101: 75,750 and 25,250 dishes of 101 kinds (5.0 GB).

    Args, Returns, Raises: as `cub`; root is or holds the folder food-101.
    """
    found = _read("food101", split, root, download, listings.food101, ("food-101",), ("meta", "images"))
    return PhotoSet("food101", transform=transform, **found)


def eurosat(split: str, transform: Transform, root: str | Path | None = None, download: bool = True) -> PhotoSet:
    """EuroSAT (RGB): 24,000 and 3,000 satellite images of 10 kinds of land, 64 x 64 pixels (0.09 GB).

    The split is ours (data/eurosat_split.json): the data set has none, and the paper's was not published.

    Args, Returns, Raises: as `cub`; root is or holds the folder 2750 (or eurosat/2750, as torchvision puts it).
    """
    found = _read("eurosat", split, root, download, listings.eurosat, ("2750", "eurosat/2750"), ("AnnualCrop",))
    return PhotoSet("eurosat", transform=transform, **found)


def imagenet(split: str, transform: Transform, root: str | Path) -> PhotoSet:
    """ImageNet 2012 from a folder that you have: 1,281,167 and 50,000 images of 1,000 classes. Nothing is downloaded.

    Args:
        split: "train", or "val", which "test" means too.
        transform: PIL picture -> tensor [3, H, W]; `vlm.preprocess`.
        root: holds `train` and `val` with a folder for each synset (n01440764, ...); or what Kaggle's archive unpacks
            to, ILSVRC/Data/CLS-LOC, with its LOC_val_solution.csv for a `val` without folders.

    Raises:
        ValueError: unknown split; other folders than the 1,000 synsets. FileNotFoundError: no such folder, no labels.
    """
    split = _checked({"test": "val"}.get(split, split), ("train", "val"), "imagenet")
    return PhotoSet("imagenet", transform=transform, **_listed(listings.imagenet, _given(root, "imagenet"), split))


def waterbirds(split: str, transform: Transform, root: str | Path) -> PhotoSet:
    """Waterbirds (Sagawa et al. 2020) from a folder that you have: CUB's birds on land or water. Nothing is downloaded.

    Items also have `background` 0 land / 1 water and `group` 0 to 3, twice the label plus the background.

    Args:
        split: "train" (95 % of the birds before their own ground), "validation" or "test" (balanced).
        transform: PIL picture -> tensor [3, H, W]; `vlm.preprocess`.
        root: the folder waterbird_complete95_forest2water2 with its metadata.csv, or the one that it is in.

    Raises:
        ValueError: unknown split. FileNotFoundError: no metadata.csv.
    """
    split, root = _checked(split, ("train", "validation", "test"), "waterbirds"), _given(root, "waterbirds")
    inner = root / "waterbird_complete95_forest2water2"
    listed = _listed(listings.waterbirds, inner if inner.is_dir() else root, split)
    found = PhotoSet("waterbirds", transform=transform, **listed)
    found.group_names = [f"{bird} on {ground}" for bird in listings.WATERBIRDS for ground in listings.GROUNDS]
    return found


def folder(root: str | Path, transform: Transform) -> PhotoSet:
    """Pictures of your own: one sub-folder a category, with pictures in it or in folders below it.

    The sub-folders' names are the categories, in alphabetical order, written as the banks write them: `apple_pie` is
    "apple pie", `001.Black_footed_Albatross` is "Black footed Albatross", `AnnualCrop` is "Annual Crop". Files whose
    names begin with a dot are left out; other files that are no pictures, and links to folders within a category, too,
    with a warning. Pictures are turned upright as their EXIF orientation says, and transparent ones put on white.

    Args:
        root: the folder of folders.
        transform: PIL picture -> tensor [3, H, W]; `vlm.preprocess`.

    Raises:
        FileNotFoundError: no such folder. ValueError: no sub-folder, one without a picture, or two of one category.

    Example:
        >>> mine = folder("pictures", vlm.preprocess)  # doctest: +SKIP
    """
    root = _given(root, "folder")
    inside = [path for path in sorted(root.iterdir(), key=lambda path: path.name) if not path.name.startswith(".")]
    folders = [path.name for path in inside if path.is_dir()]
    if not folders:
        raise ValueError(f"{root} has no sub-folders; put the pictures of each category into a folder of its name.")
    categories = [listings.words(name) for name in folders]
    if len(set(categories)) < len(folders):
        twice = [name for name, category in zip(folders, categories) if categories.count(category) > 1]
        raise ValueError(f"{root}: {', '.join(twice)} name the same category; put their pictures into one folder.")
    files, labels, odd = [], [], [path.name for path in inside if not path.is_dir() and _counts(path.name)]
    for label, name in enumerate(folders):
        pictures, others = _pictures(root, name)
        if not pictures:
            raise ValueError(f"{root / name} holds no picture ({', '.join(_PICTURES)}): put some into it, or "
                             "delete the folder, which counts as a category.")
        files, labels, odd = files + pictures, labels + [label] * len(pictures), odd + others
    if odd:
        warnings.warn(f"{root}: {len(odd)} files (or links to folders) that are no pictures of a category are left "
                      f"out, such as {', '.join(odd[:3])}.", stacklevel=2)
    return PhotoSet(f"folder {root.name}", root, files, labels, categories, transform, tidy=True)


def _pictures(root: Path, sub: str) -> tuple[list[str], list[str]]:
    """Paths below `root` of the pictures of the folder of a category, and of what is none."""
    pictures, others = [], []
    for place, folders, names in os.walk(root / sub):
        below = Path(place).relative_to(root)
        others += [(below / name).as_posix() for name in folders if (root / below / name).is_symlink()]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(filter(_counts, names)):
            (pictures if name.lower().endswith(_PICTURES) else others).append((below / name).as_posix())
    return pictures, others


def _counts(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _SYSTEM


def _checked(split: str, known: Sequence[str], name: str) -> str:
    if split not in known:
        raise ValueError(f"unknown split {split!r} of {name}; choose one of {', '.join(known)}")
    return split


def _given(root: str | Path, name: str) -> Path:
    if root is None:
        raise ValueError(f"{name} is not downloaded: pass root, the folder that you have it in.")
    root = Path(root).expanduser().absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"{name}: there is no folder {root}; pass root, the folder that you have it in.")
    return root


def _read(name: str, split: str, root: str | Path | None, download: bool, listing: Callable[[Path, str], dict],
          places: Sequence[str], marks: Sequence[str]) -> dict:
    """Find the data set, in `root` itself or in one of the `places` there, or fetch it; then read its lists."""
    _checked(split, ("train", "test"), name)
    base = cache_folder() / name if root is None else Path(root).expanduser().absolute()
    candidates = [base, *(base / place for place in places)]
    found = next((place for place in candidates if all((place / mark).exists() for mark in marks)), None)
    if found is None:
        found = fetch(name, ARCHIVES[name], base, download) / places[0]
    return _listed(listing, found, split)


def _listed(listing: Callable[[Path, str], dict], root: Path, split: str) -> dict:
    try:
        return listing(root, split)
    except (KeyError, IndexError) as error:
        raise ValueError(f"the lists in {root} are not whole or do not agree ({type(error).__name__}: {error}); unpack "
                         "the data set again.") from error
