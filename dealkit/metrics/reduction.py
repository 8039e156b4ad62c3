"""What all metrics share: the reduction, and the checks of their inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from dealkit.normalize import check_maps, check_option

REDUCTIONS = ("mean", "none")


def reduce(values: Tensor, reduction: str) -> Tensor | float:
    """ "none": the values themselves. "mean": the mean of those that are not NaN as a float, NaN if none is left."""
    check_option(reduction, REDUCTIONS, "reduction")
    return values if reduction == "none" else float(values.cpu().double().nanmean())


def check_concept_maps(maps: Tensor) -> None:
    """Raise unless `maps` is `[B, K, h, w]`, floating point and finite."""
    check_maps(maps, "maps", "[B, K, h, w]")
    if not torch.isfinite(maps).all():
        raise ValueError("maps hold NaN or infinite values; a metric of them would mean nothing. "
                         "Look for the cause in the model (half precision, a diverged training run).")


def check_masks(maps: Tensor, masks: Tensor) -> None:
    """Raise unless `masks` is `[B, K, H, W]` bool with the maps' B and K and at least their resolution."""
    check_concept_maps(maps)
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        found = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise TypeError(f"masks are {found}; expected a bool tensor, True inside the part. Convert with masks > 0.5.")
    if masks.ndim != 4 or masks.shape[:2] != maps.shape[:2]:
        raise ValueError(f"masks have shape {tuple(masks.shape)}; expected [B, K, H, W] with B, K = "
                         f"{tuple(maps.shape[:2])} as in the maps: one mask per image and concept.")
    if masks.shape[2] < maps.shape[2] or masks.shape[3] < maps.shape[3]:
        raise ValueError(f"masks of {tuple(masks.shape[2:])} pixels are coarser than the {tuple(maps.shape[2:])} maps; "
                         "pass the masks at the resolution of the images.")
