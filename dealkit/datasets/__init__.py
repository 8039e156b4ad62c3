"""Data sets whose items are dicts: image [3, H, W] float, label int and, where known, background, part_masks, ..."""
from dealkit.datasets.birdworld import Birdworld
from dealkit.datasets.photos import Photographs, bundled_photographs
from dealkit.datasets.pictures import open_picture

__all__ = ["Birdworld", "Photographs", "bundled_photographs", "open_picture"]
