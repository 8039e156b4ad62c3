"""What all metrics share: the reduction, the maps at the resolution of an image, and the checks of the inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dealkit.normalize import at_least_float32, check_maps, check_option, is_dead, normalize_maps

REDUCTIONS = ("mean", "none")


def reduce(values: Tensor, reduction: str) -> Tensor | float:
    """ "none": the values themselves. "mean": the mean of those that are not NaN as a float, NaN if none is left."""
    check_option(reduction, REDUCTIONS, "reduction")
    return values if reduction == "none" else float(values.cpu().double().nanmean())


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """`[B, K, h, w]` -> `[B, K, *size]`, bilinear, at least float32."""
    return F.interpolate(at_least_float32(maps), size=size, mode="bilinear", align_corners=False)


def stretched(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Up-sampled, then stretched to 0..1 map by map; a dead map is 0 everywhere.

    Up-sampling by a factor that is not whole may leave roundings on a constant map: they must not be stretched.
    """
    return normalize_maps(upsample(maps, size)).masked_fill(is_dead(maps)[..., None, None], 0.0)


def levels(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """`stretched` in millionths, as integers: for an order of pixels in which a rounding breaks no tie."""
    return (stretched(maps, size) * 1e6).round().int()


def check_concept_maps(maps: Tensor) -> None:
    """Raise unless `maps` is `[B, K, h, w]`, floating point and finite."""
    check_maps(maps, "maps", "[B, K, h, w]")
    if not torch.isfinite(maps).all():
        raise ValueError("maps hold NaN or infinite values; a metric of them would mean nothing. "
                         "Look for the cause in the model (half precision, a diverged training run).")


def check_images(images: Tensor) -> None:
    """Raise unless `images` is `[B, C, H, W]` and floating point."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images are {found}; expected a floating-point tensor [B, C, H, W], as vlm.preprocess gives.")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected [B, C, H, W] with at least one image.")


def check_maps_of_images(maps: Tensor, images: Tensor) -> None:
    """Raise unless `maps` `[B, K, h, w]` has a row for each of the images, and at most their resolution."""
    check_images(images)
    check_concept_maps(maps)
    if len(images) != len(maps):
        raise ValueError(f"there are {len(images)} images and maps of {len(maps)}; expected one row of maps per image, "
                         "in the same order.")
    if maps.shape[2] > images.shape[2] or maps.shape[3] > images.shape[3]:
        raise ValueError(f"maps of {tuple(maps.shape[2:])} are finer than the {tuple(images.shape[2:])} pixels of the "
                         "images; pass the maps at the resolution of the images at most.")


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
