"""Where a point of a picture lies after its transform: resizing and cropping, as models' transforms do it.

Coordinates are continuous: (0, 0) is the top left corner of the picture, the centre of its first pixel (0.5, 0.5).
"""
from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torchvision.transforms as v1
from open_clip import transform as of_clip
from torch import nn
from torchvision.transforms import v2

_LISTS = (v1.Compose, v2.Compose, nn.Sequential)
# They change colours or types, and no place. (open_clip's MaybeToTensor is a ToTensor.)
_STILL = (v1.ToTensor, v1.PILToTensor, v1.ConvertImageDtype, v1.Normalize, v1.Grayscale, v1.ColorJitter, v2.ToTensor,
          v2.PILToTensor, v2.ToImage, v2.ToDtype, v2.ConvertImageDtype, v2.Normalize, v2.Grayscale, v2.ColorJitter,
          nn.Identity)
# Names, because not every version of open_clip and torchvision has them; pictures are RGB already when they come here.
_TO_RGB = ("MaybeConvertMode", "_convert_to_rgb", "RGB")


class View(NamedTuple):
    """What became of a picture: (x, y) -> (x * scale[0] + shift[0], y * scale[1] + shift[1]), in `size` = (w, h)."""

    size: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    shift: tuple[float, float] = (0.0, 0.0)

    def resized(self, size: tuple[int, int]) -> View:
        factor = [new / old for new, old in zip(size, self.size)]
        return View(size, tuple(s * f for s, f in zip(self.scale, factor)),
                    tuple(s * f for s, f in zip(self.shift, factor)))

    def cut(self, size: tuple[int, int], corner: tuple[int, int]) -> View:
        """A window of this size whose top left corner is at `corner`; negative where it was padded."""
        return View(size, self.scale, tuple(shift - start for shift, start in zip(self.shift, corner)))

    def points(self, points: np.ndarray) -> np.ndarray:
        """`[..., 2]` points of the picture -> where they are now; NaN where they are cropped away."""
        moved = points * np.array(self.scale) + np.array(self.shift)
        inside = ((moved >= 0) & (moved < np.array(self.size))).all(axis=-1, keepdims=True)
        return np.where(inside, moved, np.nan)

    def box(self, box: np.ndarray) -> np.ndarray:
        """`[4]` x, y, width, height -> the part of it that is still in the picture; NaN where nothing is."""
        corners = np.stack([box[:2], box[:2] + box[2:]]) * np.array(self.scale) + np.array(self.shift)
        start, end = np.clip(corners, 0, np.array(self.size, float))
        return np.concatenate([start, end - start]) if (end > start).all() else np.full(4, np.nan)


def view_of(transform: Callable, size: tuple[int, int]) -> View:
    """Follow a transform through its steps.

    Args:
        transform: `vlm.preprocess`, or a Compose of torchvision's Resize and CenterCrop and of open_clip's own
            ResizeKeepRatio and CenterCropOrPad, with steps between that move nothing (ToTensor, Normalize, colours).
        size: (width, height) of the picture.

    Raises:
        ValueError: a step that moves things by chance, or that is not known.

    Example:
        >>> view_of(v1.Compose([v1.Resize(224), v1.CenterCrop(224)]), (448, 336)).shift
        (-37.0, 0.0)
    """
    view = View(tuple(size))
    for step in _steps(transform):
        if isinstance(step, (v1.Resize, v2.Resize)) and step.size is not None:
            view = view.resized(_resize(view.size, step))
        elif isinstance(step, of_clip.ResizeKeepRatio) and not step.random_scale_prob and not step.random_aspect_prob:
            height, width = step.get_params(SimpleNamespace(size=view.size), step.size, step.longest)
            view = view.resized((width, height))
        elif isinstance(step, (v1.CenterCrop, v2.CenterCrop, of_clip.CenterCropOrPad)):
            view = _crop(view, step.size)
        elif not isinstance(step, _STILL) and _name(step) not in _TO_RGB:
            raise ValueError(
                f"it is not known what {_name(step)} does to points, so part points and boxes cannot follow the "
                "picture. Use Resize, CenterCrop, ToTensor and Normalize (such as vlm.preprocess), or do without them: "
                "points=False.")
    return view


def _name(step: Callable) -> str:
    return getattr(step, "__name__", type(step).__name__)


def _steps(transform: Callable) -> list[Callable]:
    if not isinstance(transform, _LISTS):
        return [transform]
    parts = transform if isinstance(transform, nn.Sequential) else transform.transforms
    return [step for part in parts for step in _steps(part)]


def _resize(size: tuple[int, int], step: v1.Resize | v2.Resize) -> tuple[int, int]:
    """torchvision's rule: two numbers are height and width, one is the short side, and the long one is cut off."""
    wanted = [step.size] if isinstance(step.size, int) else list(step.size)
    if len(wanted) == 2:
        return wanted[1], wanted[0]
    short, long = sorted(size)
    new = (wanted[0], int(wanted[0] * long / short))
    if step.max_size is not None and new[1] > step.max_size:
        new = (int(step.max_size * new[0] / new[1]), step.max_size)
    return new if size[0] <= size[1] else new[::-1]


def _crop(view: View, size: int | tuple[int, int]) -> View:
    """The middle; a side that is too short is padded, and the odd pixel goes behind."""
    wanted = (size, size) if isinstance(size, int) else (size[-1], size[0])      # they say (height, width)
    corner = tuple(round((have - want) / 2) if have >= want else -((want - have) // 2)
                   for have, want in zip(view.size, wanted))
    return view.cut(wanted, corner)
