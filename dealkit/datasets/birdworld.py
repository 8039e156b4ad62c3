"""Birdworld: procedural birds with an exact mask for every part.

A world in which "the explanation is in the wrong place" can be checked pixel by pixel. `painter.py` draws the birds.
"""
from __future__ import annotations

import copy

import numpy as np
import torch
from torch.utils.data import Dataset

from dealkit.datasets.painter import BACKGROUNDS, COLOURS, EYE, PARTS, SPLITS, image_keys, render, uniforms

# Invented names (nobody should take this for ornithology). Two lines in a row are twins that differ in one part;
# the first of a pair lives on land, the second on water. So the background gives the twin away: the shortcut.
SPECIES = {
    #             head      wing      belly     tail      beak
    "zorvit":   ("red",    "blue",   "yellow", "green",  "orange"),   # twins by the beak
    "pelmar":   ("red",    "blue",   "yellow", "green",  "purple"),
    "tirrun":   ("orange", "green",  "blue",   "red",    "yellow"),   # tail
    "fendal":   ("orange", "green",  "blue",   "purple", "yellow"),
    "quorbi":   ("yellow", "purple", "red",    "orange", "green"),    # wing
    "luskel":   ("yellow", "orange", "red",    "orange", "green"),
    "drennic":  ("green",  "red",    "purple", "yellow", "blue"),     # head
    "mivoda":   ("blue",   "red",    "purple", "yellow", "blue"),
    "hollask":  ("blue",   "yellow", "orange", "blue",   "red"),      # belly
    "ruvane":   ("blue",   "yellow", "green",  "blue",   "red"),
    "skerrol":  ("purple", "orange", "blue",   "green",  "blue"),     # beak
    "ondrip":   ("purple", "orange", "blue",   "green",  "red"),
    "bastrel":  ("green",  "purple", "orange", "purple", "yellow"),   # tail
    "vellix":   ("green",  "purple", "orange", "red",    "yellow"),
    "jarnip":   ("orange", "yellow", "green",  "blue",   "purple"),   # wing
    "corvane":  ("orange", "blue",   "green",  "blue",   "purple"),
}
SIZES = {"pretrain": 12_000, "train": 2_400, "validation": 640, "test": 1_280}     # default number of images


class Birdworld(Dataset):
    """Procedural birds with labels, backgrounds, part colours and exact part masks.

    An item is a dict: image [3, size, size] float32 in [0, 1] (what the "birdworld-vit" model takes: its normalisation
    is the identity), label int (-1 for a bird of no species), background 0 land / 1 water, group 0..3 (twice the
    species' home plus the background), attributes [5] int (colour of each part), part_masks [5, size, size] bool.

    Args:
        split: "pretrain", "train", "validation" or "test"; their random streams are disjoint for every seed.
        n: number of images; None for the split's own (SIZES). Fewer are the first ones of more.
        correlation: probability in [0, 1] that a bird stands in front of its species' home. The test split ignores it:
            there, species x background is balanced exactly (for n a multiple of 32).
        seed: any int >= 0; another seed is another world of the same kind.
        size: side in pixels, 64 to 256, a multiple of 8; the scene is the same in every size.
        random_birds: share of birds with five random colours and no species.

    Raises:
        ValueError: for an unknown split, or a size, n, seed, correlation or share out of range.

    Example:
        >>> birds = Birdworld("test", n=32)
        >>> birds[0]["part_masks"].shape
        torch.Size([5, 80, 80])
    """

    categories = list(SPECIES)
    parts = list(PARTS)
    group_names = [f"{home} species on {ground}" for home in BACKGROUNDS for ground in BACKGROUNDS]
    # what a concept is told apart from: for each part, the same part in each of the six colours
    concept_options = [[f"{colour} {part}" for colour in COLOURS] for part in PARTS]

    def __init__(self, split: str = "train", n: int | None = None, correlation: float = 0.95, seed: int = 0,
                 size: int = 80, random_birds: float = 0.0):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        n = SIZES[split] if n is None else n
        if not all(isinstance(value, (int, np.integer)) for value in (n, seed, size)):
            raise ValueError(f"n is {n!r}, seed {seed!r} and size {size!r}; all three are whole numbers")
        if not (64 <= size <= 256 and size % 8 == 0):
            raise ValueError(f"size is {size}; Birdworld is drawn at 64, 72, 80, ... 256 pixels, a multiple of 8")
        if not 0 <= correlation <= 1 or not 0 <= random_birds <= 1:
            raise ValueError(f"correlation ({correlation}) and random_birds ({random_birds}) are shares in [0, 1]")
        if n < 1 or not 0 <= seed < 2 ** 64:
            raise ValueError(f"n is {n} and seed is {seed}; n must be at least 1, seed from 0 to 2^64 - 1")
        self.split, self.seed, self.size = split, seed, size
        u = uniforms(image_keys(seed, split, np.arange(n)), n=8, stream=5)
        self.labels = np.arange(n) % len(SPECIES)
        self.backgrounds = np.where(u[:, 0] < np.float32(correlation), self.labels % 2, 1 - self.labels % 2)
        if split == "test":
            self.backgrounds = np.arange(n) // len(SPECIES) % 2
        table = np.array([[COLOURS.index(c) for c in colours] for colours in SPECIES.values()])
        free = u[:, 1] < np.float32(random_birds)
        self.attributes = np.where(free[:, None], (u[:, 2:7] * np.float32(6)).astype(np.int64), table[self.labels])
        self.backgrounds[free] = (u[free, 7] < .5)
        self.labels = np.where(free, -1, self.labels)
        self._images = np.empty((n, size, size, 3), np.uint8)            # filled as images are asked for
        self._layers = np.empty((n, size, size), np.uint8)
        self._painted = np.zeros(n, bool)

    def on_other_background(self) -> Birdworld:
        """The counterfactual: the same birds, pixel for pixel, on water where this set has land and the reverse."""
        other = copy.copy(self)
        other.backgrounds = 1 - self.backgrounds
        other._images, other._layers = np.empty_like(self._images), np.empty_like(self._layers)
        other._painted = np.zeros(len(self), bool)
        return other

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """What a DataLoader calls: a whole batch is painted at once."""
        batch = self.batch(indices)
        return [{name: value[i] if value.ndim > 1 else value[i].item() for name, value in batch.items()}
                for i in range(len(indices))]

    def batch(self, indices) -> dict[str, torch.Tensor]:
        """The items of `indices` as one dict of stacked tensors: image [B, 3, H, W], part_masks [B, 5, H, W], ..."""
        indices = np.arange(len(self))[indices]                          # counts negative ones from the end
        todo = np.unique(indices[~self._painted[indices]])
        if len(todo):
            self._images[todo], self._layers[todo] = render(
                self.seed, self.split, todo, self.attributes[todo], self.backgrounds[todo], self.size)
            self._painted[todo] = True
        layers = self._layers[indices]
        layers = np.where(layers == EYE, 1 + PARTS.index("head"), layers)
        labels, backgrounds = self.labels[indices], self.backgrounds[indices]
        return {"image": torch.from_numpy(self._images[indices]).permute(0, 3, 1, 2).float() / 255,
                "label": torch.from_numpy(labels), "background": torch.from_numpy(backgrounds),
                "group": torch.from_numpy(np.where(labels < 0, -1, labels % 2 * 2 + backgrounds)),
                "attributes": torch.from_numpy(self.attributes[indices]),
                "part_masks": torch.from_numpy(np.stack([layers == p for p in range(1, 6)], axis=1))}
