"""Localization against points: for data sets that mark where a part is, but not how far it reaches (CUB).

A point becomes a disc, and the disc a mask for the metrics of `localization`. A disc is not the part: it is too big for
a beak and too small for a wing, so compare methods by these numbers, not parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dealkit.metrics.localization import mass_in_mask, pointing_game


@torch.no_grad()
def point_masks(points: Tensor, size: tuple[int, int], radius: float = 0.1) -> Tensor:
    """A disc around every point.

    Args:
        points: `[B, K, 2]`, (x, y) in pixels of the image, from (0, 0) at its top left corner to (W, H); the centre of
            the first pixel is (0.5, 0.5). NaN for a point that is not visible.
        size: (H, W) of the image.
        radius: of the disc, as a share of the longer side; at least one pixel.

    Returns:
        `[B, K, H, W]` bool, True where the centre of a pixel is at most `radius` from the point; all False for a point
        that is not visible, or whose disc lies outside of the image.

    Raises:
        TypeError, ValueError: points that are not floating point or not `[B, K, 2]`; one of x and y NaN without the
            other; a radius under one pixel.

    Example:
        >>> point_masks(torch.tensor([[[1.5, 1.5]]]), (3, 3), radius=1 / 3).sum()    # a pixel and its four neighbours
        tensor(5)
    """
    if not isinstance(points, Tensor) or not points.is_floating_point():
        found = points.dtype if isinstance(points, Tensor) else type(points).__name__
        raise TypeError(f"points are {found}; expected a floating-point tensor [B, K, 2] of (x, y) in pixels, with NaN "
                        "for points that are not visible. Convert with .float().")
    if points.ndim != 3 or points.shape[-1] != 2 or 0 in points.shape:
        raise ValueError(f"points have shape {tuple(points.shape)}; expected [B, K, 2]: x and y of one point per image "
                         "and concept.")
    if (points.isnan().sum(dim=-1) == 1).any():
        raise ValueError("a point has NaN for only one of x and y; a point that is not visible has NaN for both.")
    if not radius * max(size) >= 1:
        raise ValueError(f"radius is {radius}, {radius * max(size):.2f} pixels; expected a share of the longer side of "
                         "at least one pixel, such as 0.1.")
    rows, columns = (torch.arange(side, device=points.device) + 0.5 for side in size)
    x, y = points[..., 0, None, None], points[..., 1, None, None]
    # Half a thousandth of a pixel, so that rounding does not decide about pixels on the rim. NaN is nowhere near.
    return (rows[:, None] - y).square() + (columns - x).square() <= (radius * max(size) + 5e-4) ** 2


def point_hits(maps: Tensor, points: Tensor, size: tuple[int, int], radius: float = 0.1,
               reduction: str = "mean") -> Tensor | float:
    """Does the peak of the map lie within `radius` of the point? 1 for a hit, 0 for a miss.

    Args:
        maps: `[B, K, h, w]`, up-sampled to the image's size.
        points, size, radius: as `point_masks`; point k of image b belongs to map k of image b.
        reduction: "mean" or "none" (`[B, K]`).

    Returns:
        A float in 0..1, or `[B, K]`; NaN where the point is not visible. Chance is the disc's share of the image, about
        0.03 for a radius of 0.1 on a square.

    Raises:
        TypeError, ValueError: as `point_masks` and `pointing_game`.

    Source: the pointing game with a tolerance, Zhang et al., IJCV 2018 (there 15 pixels).

    Example:
        >>> maps = torch.zeros(1, 1, 7, 7)
        >>> maps[..., 2, 4] = 1.0
        >>> point_hits(maps, torch.tensor([[[150.0, 80.0]]]), (224, 224))    # the patch's centre is (144, 80)
        1.0
    """
    return pointing_game(maps, point_masks(points, size, radius), reduction)


def point_mass(maps: Tensor, points: Tensor, size: tuple[int, int], radius: float = 0.1,
               reduction: str = "mean") -> Tensor | float:
    """The share of the map's mass that lies within `radius` of the point.

    Arguments, errors and chance as `point_hits`; the maps are non-negative, as for `mass_in_mask`.
    """
    return mass_in_mask(maps, point_masks(points, size, radius), reduction)
