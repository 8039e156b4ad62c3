"""What losses and metrics share: the min-max normalisation of maps, and how much maps overlap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

OVERLAPS = ("product", "cosine", "soft_iou")


def normalize_maps(maps: Tensor) -> Tensor:
    """Stretch every map to the range 0..1 over its own pixels (min-max).

    A constant map has no range to stretch: it becomes zeros, and its gradient is zero rather than NaN. "Constant" means
    up to rounding: a range of at most a few units in the last place of the largest value.

    Args:
        maps: `[..., h, w]`, floating point, any unit; the last two axes are one map. Half precision is computed in
            float32.

    Returns:
        A tensor of the same shape and dtype; every map that is not constant has minimum 0 and maximum 1.
        Normalising twice changes nothing.

    Raises:
        TypeError: `maps` is not a floating-point tensor.
        ValueError: fewer than two axes, or no pixels.

    Source: the hat over h in `R_disentangle` and `R_localize` of DEAL (Li et al., ECCV 2024).

    Example:
        >>> normalize_maps(torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
        tensor([[0.0000, 0.2500],
                [0.5000, 1.0000]])
    """
    _check_floating(maps, "maps")
    if maps.ndim < 2 or 0 in maps.shape[-2:]:
        raise ValueError(f"maps have shape {tuple(maps.shape)}; expected [..., h, w] with at least one pixel.")
    values = at_least_float32(maps)
    low = values.amin(dim=(-2, -1), keepdim=True)
    span = values.amax(dim=(-2, -1), keepdim=True) - low
    constant = _is_constant(values, span)
    # Two `where`s: the inner one keeps 0/0 out of the forward pass, the outer one keeps it out of the gradient.
    stretched = (values - low) / torch.where(constant, 1.0, span)
    return torch.where(constant, 0.0, stretched).to(maps.dtype)


def overlap_per_image(maps: Tensor, kind: str = "product") -> Tensor:
    """How much the K concept maps of one image cover the same pixels.

    "product" is the paper's: the sum over pairs i < j and over pixels of h_i h_j. It grows with the number of pixels
    and of pairs, so it compares models on one grid only. "cosine" is the mean over pairs of the cosine between the
    flattened maps: 0 for disjoint maps, 1 for equal ones, on any grid. A constant map overlaps with nothing (0).
    "soft_iou" is the mean over pairs of sum min(h_i, h_j) / sum max(h_i, h_j), with the same bounds on any grid; of
    maps that are 0 or 1 it is the intersection over the union.

    Args:
        maps: `[B, K, h, w]`, K >= 2; normalised inside (idempotent).
        kind: "product", "cosine" or "soft_iou".

    Returns:
        `[B]`.

    Raises:
        TypeError, ValueError: maps that are not `[B, K >= 2, h, w]`, or an unknown kind.
    """
    check_maps(maps, "maps", "[B, K, h, w]")
    check_option(kind, OVERLAPS, "overlap kind")
    if maps.shape[1] < 2:
        raise ValueError(f"overlap needs at least two concepts; the maps have K = {maps.shape[1]}. "
                         "Explain two or more concepts of the category, or leave this term out.")
    flat = normalize_maps(maps).flatten(2)  # [B, K, h*w]
    first, second = torch.triu_indices(maps.shape[1], maps.shape[1], offset=1, device=maps.device)
    if kind == "soft_iou":
        one, other = flat[:, first], flat[:, second]
        # A union is 0 (two constant maps) or at least 1, so the bound acts on constant maps only.
        return (torch.minimum(one, other).sum(-1) / torch.maximum(one, other).sum(-1).clamp_min(0.5)).mean(dim=1)
    if kind == "cosine":
        # A normalised map has norm 0 (constant) or at least 1, so eps = 0.5 acts on constant maps only.
        flat = F.normalize(flat, dim=-1, eps=0.5)
    gram = flat @ flat.transpose(1, 2)  # [B, K, K]: entry i, j is the inner product of maps i and j
    pairs = gram[:, first, second]
    return pairs.sum(dim=1) if kind == "product" else pairs.mean(dim=1)


def is_dead(maps: Tensor) -> Tensor:
    """True for every map that is constant (all zero included): `[..., h, w]` -> `[...]`. It points nowhere."""
    values = at_least_float32(maps)
    span = values.amax(dim=(-2, -1), keepdim=True) - values.amin(dim=(-2, -1), keepdim=True)
    return _is_constant(values, span)[..., 0, 0]


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision as float32, anything else unchanged: maps are often smaller than half precision resolves."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def smallest_range(dtype: torch.dtype) -> float:
    """The range below which a map counts as constant: any smaller, and the gradient 1 / range would overflow."""
    return torch.finfo(dtype).tiny / torch.finfo(dtype).eps


def check_maps(maps: Tensor, name: str, layout: str) -> None:
    """Raise unless `maps` is a floating-point tensor with the axes that `layout` spells, none of them empty."""
    _check_floating(maps, name)
    rank = layout.count(",") + 1
    if maps.ndim != rank:
        raise ValueError(f"{name} has shape {tuple(maps.shape)}; expected {rank} axes, {layout}. "
                         "B counts images, K concepts; add a missing axis with unsqueeze, drop one by indexing.")
    if 0 in maps.shape:
        raise ValueError(f"{name} has shape {tuple(maps.shape)} ({layout}): an axis is empty. "
                         "Pass at least one entry along every axis.")


def check_option(value: str, options: tuple[str, ...], name: str) -> None:
    """Raise ValueError unless `value` is one of `options`."""
    if value not in options:
        raise ValueError(f"unknown {name} {value!r}; expected one of {', '.join(map(repr, options))}.")


def _check_floating(maps: Tensor, name: str) -> None:
    if not isinstance(maps, Tensor):
        raise TypeError(f"{name} is a {type(maps).__name__}; expected a torch tensor. Convert it with torch.as_tensor.")
    if not maps.is_floating_point():
        raise TypeError(f"{name} has dtype {maps.dtype}; expected floating point. Convert it with .float().")


def _is_constant(values: Tensor, span: Tensor) -> Tensor:
    rounding = 4 * torch.finfo(values.dtype).eps * values.abs().amax(dim=(-2, -1), keepdim=True)
    # A span that is infinite or NaN is no constant: it must surface as NaN.
    return (span <= rounding.clamp(min=smallest_range(values.dtype))) & span.isfinite()
