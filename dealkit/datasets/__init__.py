"""Data sets whose items are dicts: image [3, H, W] float, label int and, where known, background, part_masks, ..."""
from dealkit.datasets.birdworld import Birdworld

__all__ = ["Birdworld"]
