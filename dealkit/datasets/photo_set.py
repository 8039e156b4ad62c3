"""`PhotoSet`: pictures in files, with labels; what stands behind `photos`. And two selections of any data set:
`hold_out`, a validation split, and `balance`, a training set in which every group is as frequent."""
from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from dealkit.datasets.geometry import view_of
from dealkit.datasets.pictures import FORMATS, _decode

Transform = Callable[[PIL.Image.Image], Tensor]


class PhotoSet(Dataset):
    """Pictures in files, opened one by one as they are asked for.

    Items are dicts: `image` [3, H, W], what `transform` makes of the RGB picture; `label` int; an int for each of
    `columns`; with part points also `part_points` [P, 2] and `box` [4] (x, y, width, height), float32, in pixels of
    `image` from its top left corner, NaN where invisible or cropped away.

    Args:
        name: of the data set.
        root: the folder that `files` are relative to.
        files: paths with "/", one a picture.
        labels: one int a picture.
        categories: name of every label.
        transform: PIL picture -> tensor [3, H, W]; `vlm.preprocess`.
        columns: name -> one int a picture, such as `group` and `background`.
        parts: names of the part points.
        points: [N, P, 2], x and y in pixels of the file's picture, NaN where invisible; None for none.
        boxes: [N, 4] in the same pixels.
        tidy: turn pictures as their EXIF orientation says and put transparent ones on white, as `open_picture` does.
            False reads the stored pixels, which is what published figures and part points are of.

    Attributes:
        name, root, files, labels, categories, transform, parts: as above; `parts` is empty without points.
        backgrounds: the column "background", where there is one.

    Raises:
        TypeError: a transform that cannot be called, or that does not return a tensor [3, H, W].
        ValueError: no picture; a transform that points cannot follow (see `geometry`); for an item: a damaged file.
        FileNotFoundError: for an item whose file is missing.
    """

    def __init__(self, name: str, root: str | Path, files: Sequence[str], labels: Sequence[int],
                 categories: Sequence[str], transform: Transform, columns: Mapping[str, Sequence[int]] | None = None,
                 parts: Sequence[str] = (), points: np.ndarray | None = None, boxes: np.ndarray | None = None,
                 tidy: bool = False):
        if not callable(transform):
            raise TypeError(f"transform is {transform!r}; expected what makes a tensor of a PIL picture, such as "
                            "vlm.preprocess.")
        if not len(files) or not len(files) == len(labels):
            raise ValueError(f"{name}: {len(files)} pictures and {len(labels)} labels in {root}; expected as many of "
                             "either, and at least one. Check the folder and the split.")
        if points is not None:
            view_of(transform, (500, 375))                            # says now what it would say at the first item
        self.name, self.root, self.files = name, Path(root), [str(file) for file in files]
        self.labels, self.categories, self.transform = [int(label) for label in labels], list(categories), transform
        self.parts = list(parts) if points is not None else []
        self._columns = {key: [int(value) for value in values] for key, values in (columns or {}).items()}
        if "background" in self._columns:
            self.backgrounds = self._columns["background"]
        self._points, self._boxes, self._tidy = points, boxes, tidy

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        index = range(len(self))[index]
        picture = read_picture(self.root / self.files[index], self._tidy)
        image = self.transform(picture)
        if not isinstance(image, Tensor) or image.ndim != 3 or len(image) != 3:
            found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"the transform made {found} of {self.files[index]}; expected a tensor [3, H, W]: end it "
                            "with ToTensor, or pass vlm.preprocess.")
        item = {"image": image, "label": self.labels[index]}
        item |= {key: values[index] for key, values in self._columns.items()}
        if self._points is not None:
            item |= self._places(index, picture.size, (image.shape[2], image.shape[1]))
        return item

    def _places(self, index: int, size: tuple[int, int], made: tuple[int, int]) -> dict[str, Tensor]:
        view = view_of(self.transform, size)
        if view.size != made:
            raise ValueError(f"the transform made {made[0]} x {made[1]} pixels of {self.files[index]}, and "
                             f"{view.size[0]} x {view.size[1]} were expected: the points cannot follow it. Pass "
                             "points=False.")
        return {"part_points": torch.from_numpy(view.points(self._points[index])).float(),
                "box": torch.from_numpy(view.box(self._boxes[index])).float()}

    def __repr__(self) -> str:
        return f"PhotoSet({self.name!r}, {len(self):,} images, {len(self.categories):,} categories, {str(self.root)!r})"


def read_picture(path: Path, tidy: bool = False) -> PIL.Image.Image:
    """Open a file as RGB.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it cannot be read. Both name it.
    """
    try:
        with PIL.Image.open(path, formats=FORMATS) as picture:
            if picture.mode.startswith(("I", "F")):
                raise ValueError(f"{picture.mode} pixels, more than 8 bits a channel")
            return _decode(picture)[0] if tidy else picture.convert("RGB")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: the data set is not whole. Put the file back, or delete the "
                                "folder and fetch it again.") from error
    except Exception as error:                                        # Pillow's formats raise many things
        raise ValueError(f"{path} cannot be read as a picture ({type(error).__name__}: {error}). It is damaged or no "
                         "picture: fetch it again, or take it out of the data set.") from error


def in_random_order(keys: Sequence, seed: int) -> list:
    """The keys in an order that depends on nothing but them and the seed: sorted by a hash, on any machine."""
    return sorted(keys, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).hexdigest())


class Selection(Subset):
    """Some items of a data set, with what is known about it: `categories`, `parts`, `labels`, `files`, ..."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]):
        super().__init__(dataset, list(indices))
        for name in ("name", "root", "categories", "parts", "group_names", "concept_options", "transform"):
            if hasattr(dataset, name):
                setattr(self, name, getattr(dataset, name))
        for name in ("labels", "files", "backgrounds"):
            if hasattr(dataset, name):
                values = getattr(dataset, name)
                setattr(self, name, [values[i] for i in self.indices])


def hold_out(dataset: Dataset, share: float = 0.1, seed: int = 0) -> tuple[Selection, Selection]:
    """Set a share of every category aside, to choose settings by: the test split is then looked at only once.

    Args:
        dataset: one with `labels`, an int an item.
        share: of each category, in (0, 1), rounded to whole images; at least one, and at least one stays. The only
            image of a category stays in training.
        seed: another seed is another choice; the same one is the same on every machine.

    Returns:
        (training, validation), items in the order of `dataset`, with its `categories`.

    Raises:
        ValueError: a share out of range, no labels, or nothing to hold out.

    Example:
        >>> train, validation = hold_out(photos.folder("birds", vlm.preprocess), share=0.1)  # doctest: +SKIP
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}; expected the share to hold out, above 0 and below 1, such as 0.1.")
    if not hasattr(dataset, "labels"):
        raise ValueError(f"{type(dataset).__name__} has no labels, so no share of every category can be held out; give "
                         "it an attribute labels, an int for each item.")
    places = defaultdict(list)
    for index, label in enumerate(dataset.labels):
        places[int(label)].append(index)
    held = set()
    for indices in places.values():
        count = min(max(1, round(share * len(indices))), len(indices) - 1)
        held.update(in_random_order(indices, seed)[:count])
    if not held:
        raise ValueError("every category has one image only, so none can be held out; validate on another data set.")
    return (Selection(dataset, [i for i in range(len(dataset)) if i not in held]), Selection(dataset, sorted(held)))


def balance(dataset: Dataset, groups: Sequence | None = None, seed: int = 0) -> Selection:
    """Draw a training set of the same size in which every group is as frequent as any other.

    The plain remedy for a spurious correlation, and the one to beat. It needs to know each image's group, which DEAL
    does not.

    Args:
        dataset: what to draw from. groups: the group of each item, anything that compares; None is each pair of label
            and background, from the attributes `labels` and `backgrounds`.
        seed: of the draw.

    Returns:
        As many items as the data set has, up to rounding. A small group's items come several times, a large group's
        are a random choice. A group without any item stays without: then nothing is balanced by it.

    Raises:
        ValueError: no groups and no backgrounds, or not one group an item.

    Source: group-balanced resampling, e.g. Idrissi et al., CLeaR 2022 ("RWG").

    Example:
        >>> train = Birdworld("train")
        >>> balanced = balance(train)
        >>> float(np.mean(train.backgrounds == train.labels % 2)), np.mean([b == y % 2 for b, y in zip(
        ...     balanced.backgrounds, balanced.labels)])
        (0.95, 0.5)
    """
    if groups is None:
        if not hasattr(dataset, "backgrounds"):
            raise ValueError(f"{type(dataset).__name__} has no backgrounds to balance; pass groups, one an item.")
        groups = list(zip(map(int, dataset.labels), map(int, dataset.backgrounds)))
    groups = groups.tolist() if hasattr(groups, "tolist") else groups            # each entry of a tensor is its own key
    if len(groups) != len(dataset):
        raise ValueError(f"there are {len(groups)} groups for {len(dataset)} items; expected one for each.")
    places = defaultdict(list)
    for index, group in enumerate(groups):
        places[group].append(index)
    rng = np.random.default_rng(seed)
    share = max(1, round(len(dataset) / len(places)))
    drawn = []
    for group in sorted(places):
        members = places[group]
        rounds, rest = divmod(share, len(members))                   # as evenly as it comes: all `rounds` times, ...
        drawn += members * rounds + rng.choice(members, rest, replace=False).tolist()       # ... and some once more
    return Selection(dataset, sorted(drawn))
