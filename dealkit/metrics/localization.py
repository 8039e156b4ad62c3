"""Localization: does the map of a concept lie on the part that the concept names?

A map is up-sampled bilinearly to the resolution of its mask. Chance for the pointing game and for the mass is the share
of the image that the mask covers. Where a mask is empty (the part is hidden) there is nothing to find: NaN.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dealkit.metrics.reduction import check_masks, levels, reduce, stretched, upsample


@torch.no_grad()
def pointing_game(maps: Tensor, masks: Tensor, reduction: str = "mean") -> Tensor | float:
    """Does the peak of the map lie inside the mask? 1 for a hit, 0 for a miss.

    A peak of several equal pixels (up-sampling makes plateaus) counts with the share of it that is inside, so that no
    corner of the image is preferred. A dead map has no peak: a miss.

    Args:
        maps: `[B, K, h, w]`, floating point.
        masks: `[B, K, H, W]` bool, mask k of image b belongs to map k of image b.
        reduction: "mean" or "none" (`[B, K]`).

    Returns:
        A float in 0..1, or `[B, K]`; NaN where the mask is empty.

    Raises:
        TypeError, ValueError: masks that are not bool, shapes that do not match, NaN maps, unknown reduction.

    Source: Zhang et al., "Top-down neural attention by excitation backprop", IJCV 2018.

    Example:
        >>> maps = torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]])
        >>> pointing_game(maps, maps > 0)
        1.0
    """
    check_masks(maps, masks)
    peak = stretched(maps, masks.shape[-2:]) >= 1 - 1e-6  # equal up to rounding
    hits = (peak & masks).sum(dim=(-2, -1)) / peak.sum(dim=(-2, -1)).clamp(min=1)
    return reduce(_undefined_where_empty(hits, masks), reduction)


@torch.no_grad()
def mass_in_mask(maps: Tensor, masks: Tensor, reduction: str = "mean") -> Tensor | float:
    """The share of the map's mass that lies inside the mask.

    Args:
        maps: `[B, K, h, w]`, non-negative, not normalised (min-max would take the smallest value's mass away).
        masks: `[B, K, H, W]` bool.
        reduction: "mean" or "none" (`[B, K]`).

    Returns:
        A float in 0..1, or `[B, K]`; 0 for a map that is all zero, NaN where the mask is empty. A uniform map scores
        the area of the mask, which is chance.

    Raises:
        TypeError, ValueError: as `pointing_game`; negative maps.

    Source: "energy-based pointing game", Wang et al., "Score-CAM", CVPR workshops 2020.

    Example:
        >>> maps = torch.tensor([[[[1.0, 3.0], [0.0, 0.0]]]])
        >>> mass_in_mask(maps, maps > 2)
        0.75
    """
    check_masks(maps, masks)
    if (maps < 0).any():
        raise ValueError("maps hold negative values, which have no mass; pass explain's maps as they are "
                         "(signed=False), or take relu() first.")
    # Scaling each map to peak 1 leaves its shares as they are, and keeps tiny maps away from underflow.
    top = maps.amax(dim=(-2, -1), keepdim=True)
    mass = upsample(maps / torch.where(top > 0, top, 1.0), masks.shape[-2:])
    share = (mass * masks).sum(dim=(-2, -1)) / torch.where(top[..., 0, 0] > 0, mass.sum(dim=(-2, -1)), 1.0)
    return reduce(_undefined_where_empty(share, masks), reduction)


@torch.no_grad()
def iou(maps: Tensor, masks: Tensor, threshold: float = 0.5, reduction: str = "mean") -> Tensor | float:
    """Intersection over union of the mask and the region where the up-sampled, normalised map exceeds `threshold`.

    Args:
        maps: `[B, K, h, w]`.
        masks: `[B, K, H, W]` bool.
        threshold: share of the map's range, in [0, 1).
        reduction: "mean" or "none" (`[B, K]`).

    Returns:
        A float in 0..1, or `[B, K]`; 0 for a dead map, NaN where the mask is empty.

    Raises:
        TypeError, ValueError: as `pointing_game`; a threshold outside [0, 1).

    Source: the Jaccard index, as used for weakly supervised localization.

    Example:
        >>> maps = torch.tensor([[[[1.0, 0.9], [0.0, 0.2]]]])
        >>> iou(maps, maps == 1)    # two pixels claimed, one of them right
        0.5
    """
    check_masks(maps, masks)
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold is {threshold}; expected a share of the map's range, 0 <= threshold < 1.")
    claimed = stretched(maps, masks.shape[-2:]) > threshold
    union = (claimed | masks).sum(dim=(-2, -1))
    score = (claimed & masks).sum(dim=(-2, -1)) / union.clamp(min=1)
    return reduce(_undefined_where_empty(score, masks), reduction)


@torch.no_grad()
def best_iou(maps: Tensor, masks: Tensor, reduction: str = "mean") -> Tensor | float:
    """Intersection over union at the threshold that suits the map best: what `iou` could reach without its 0.5.

    The threshold is chosen per map, with the mask in view: an upper bound, for comparing methods whose maps have other
    contrasts. Every value of the up-sampled map is tried; pixels of equal value (up to a millionth of the map's range)
    are claimed together. The lowest threshold claims the whole image, so chance is at least the area of the mask.

    Args:
        maps: `[B, K, h, w]`.
        masks: `[B, K, H, W]` bool.
        reduction: "mean" or "none" (`[B, K]`).

    Returns:
        A float in 0..1, or `[B, K]`; the area of the mask for a uniform map, 0 for one that is all zero, NaN where the
        mask is empty.

    Raises:
        TypeError, ValueError: as `pointing_game`.

    Source: the Jaccard index at its best threshold, per map instead of per data set as in "MaxBoxAcc" and "PxAP" of
    Choe et al., "Evaluating weakly supervised object localization methods right", CVPR 2020.

    Example:
        >>> maps = torch.tensor([[[[1.0, 0.9], [0.0, 0.2]]]])
        >>> best_iou(maps, maps == 1), iou(maps, maps == 1)
        (1.0, 0.5)
    """
    check_masks(maps, masks)
    keys = (2 * levels(maps, masks.shape[-2:]) + masks).flatten(2)  # a level and its mask in one number: one sort
    keys = _descending(keys)
    # hits among the first 1, 2, 3, ... pixels; in 32 bits, because at 224 pixels a batch is some 30 million of them
    values, hits = keys >> 1, (keys & 1).cumsum(dim=-1, dtype=torch.int32)
    claimed = torch.arange(1, keys.shape[-1] + 1, device=keys.device, dtype=torch.int32)
    scores = hits / (claimed + hits[..., -1:] - hits)
    is_cut = F.pad(values[..., 1:] < values[..., :-1], (0, 1), value=True)  # a threshold lies between these two pixels
    best = (scores * is_cut).amax(dim=-1) * maps.any(dim=-1).any(dim=-1)
    return reduce(_undefined_where_empty(best, masks), reduction)


def _descending(keys: Tensor) -> Tensor:
    """Integers in descending order along the last axis; numpy's sort takes a quarter of torch's time on a CPU."""
    if keys.device.type == "cpu":
        return torch.from_numpy(-np.sort(-keys.numpy(), axis=-1))
    return keys.sort(dim=-1, descending=True)[0]


def _undefined_where_empty(values: Tensor, masks: Tensor) -> Tensor:
    return torch.where(masks.any(dim=-1).any(dim=-1), values, float("nan"))
