"""Data sets whose items are dicts: image [3, H, W] float32, label int and, where known, background, part_masks, ..."""
from dealkit.datasets import photos
from dealkit.datasets.birdworld import Birdworld
from dealkit.datasets.fetch import cache_folder
from dealkit.datasets.photo_set import PhotoSet, Selection, balance, hold_out
from dealkit.datasets.photographs import Photographs, bundled_photographs
from dealkit.datasets.pictures import open_picture

__all__ = ["Birdworld", "PhotoSet", "Photographs", "Selection", "balance", "bundled_photographs", "cache_folder",
           "hold_out", "open_picture", "photos"]
