"""Photographs: a handful of pictures with names, and the four that scikit-image brings along."""
from __future__ import annotations

from collections.abc import Callable, Mapping

import PIL.Image
from torch import Tensor
from torch.utils.data import Dataset

from dealkit.datasets.pictures import Source, open_picture

# category in the bank "photographs" -> name of the function in skimage.data
BUNDLED = {"tabby cat": "chelsea", "espresso": "coffee", "astronaut": "astronaut", "rocket": "rocket"}


class Photographs(Dataset):
    """A few pictures, one a category.

    Items are dicts: `image` [3, H, W], what `transform` makes of the picture, and `label`, its number.

    Args:
        pictures: category -> what `open_picture` takes: a path, bytes, an array or a PIL picture.
        transform: PIL picture -> tensor; `vlm.preprocess`.

    Attributes:
        categories: list of str.
        pictures: the PIL pictures, RGB and whole.
        notes: category -> what was done to its picture, sentences; only those to which something was done.

    Raises:
        ValueError: no picture at all.
        ValueError, TypeError, FileNotFoundError: as `open_picture`.

    Example:
        >>> mine = Photographs({"parrot": "parrot.jpg", "my bicycle": "bicycle.heic.jpg"}, vlm.preprocess)
    """

    def __init__(self, pictures: Mapping[str, Source], transform: Callable[[PIL.Image.Image], Tensor]):
        if not pictures:
            raise ValueError("no picture at all; pass pictures={'parrot': 'parrot.jpg'}, one or more.")
        opened = {category: open_picture(source) for category, source in pictures.items()}
        self.categories, self.transform = list(opened), transform
        self.pictures = [picture for picture, _ in opened.values()]
        self.notes = {category: notes for category, (_, notes) in opened.items() if notes}

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.transform(self.pictures[index]), "label": range(len(self))[index]}


def bundled_photographs() -> dict[str, PIL.Image.Image]:
    """The photographs chelsea, coffee, astronaut and rocket of scikit-image, by category; nothing is downloaded."""
    from skimage import data

    return {category: PIL.Image.fromarray(getattr(data, name)()) for category, name in BUNDLED.items()}
