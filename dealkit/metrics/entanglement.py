"""Entanglement: do the maps of different concepts of one image coincide?"""

from __future__ import annotations

import torch
from torch import Tensor

from dealkit.metrics.reduction import check_concept_maps, reduce
from dealkit.normalize import is_dead, overlap_per_image


@torch.no_grad()
def overlap(maps: Tensor, kind: str = "cosine", reduction: str = "mean") -> Tensor | float:
    """How much the concept maps of an image cover the same pixels; less is better.

    A dead (constant) map overlaps with nothing, so a collapsed model scores superbly: read `dead_maps` beside it.

    Args:
        maps: `[B, K, h, w]`, K >= 2, non-negative; normalised inside.
        kind: "cosine" or "soft_iou": mean over pairs, 0..1, comparable between grids. "product": the paper's sum over
            pairs and pixels, comparable only for one grid and one K.
        reduction: "mean" or "none" (`[B]`).

    Returns:
        A float, or `[B]`.

    Raises:
        TypeError, ValueError: not `[B, K >= 2, h, w]`, not floating point, NaN, unknown kind or reduction.

    Source: `R_disentangle` of DEAL (Li et al., ECCV 2024) for "product". "cosine" is ours; the same authors' DCP
    (NeurIPS 2024) squares the cosines before it takes their mean.

    Example:
        >>> left = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> overlap(torch.stack([left, left.flip(1)])[None]), overlap(torch.stack([left, left])[None])
        (0.0, 1.0)
    """
    check_concept_maps(maps)
    return reduce(overlap_per_image(maps, kind), reduction)


@torch.no_grad()
def disentanglability(maps: Tensor, reduction: str = "mean") -> Tensor | float:
    """The paper's score, sigmoid(10 (0.2 - overlap / 100)) with the overlap of kind "product"; more is better.

    That overlap is a sum over pixels and pairs, so scores compare only on one grid with one K (the paper's table: 7 x 7
    for ViT-B/32). It lies between 0 and sigmoid(2) = 0.88, which maps without any overlap reach, dead maps included.

    Args:
        maps: `[B, K, h, w]`, K >= 2.
        reduction: "mean": the score of the mean overlap, as in the paper; "none": the score of each image, `[B]`.

    Returns:
        A float, or `[B]`.

    Raises:
        TypeError, ValueError: as `overlap`.

    Source: "disentanglability" of DEAL (Li et al., ECCV 2024).

    Example:
        >>> round(disentanglability(torch.zeros(1, 5, 7, 7)), 2)
        0.88
    """
    return reduce(disentanglability_of(overlap(maps, "product", reduction)), reduction)


def disentanglability_of(product_overlap: Tensor | float) -> Tensor:
    """The paper's score of an overlap of kind "product" that is known already, element by element.

    Args:
        product_overlap: any shape; a number counts in float64.

    Returns:
        A tensor of the same shape. It falls as the overlap rises, so an interval of the overlap turns round.

    Source: the constants are those of the paper; see `disentanglability`.

    Example:
        >>> disentanglability_of(torch.tensor([0.0, 20.0]))
        tensor([0.8808, 0.5000])
    """
    if not isinstance(product_overlap, Tensor):
        product_overlap = torch.tensor(product_overlap, dtype=torch.float64)
    return torch.sigmoid(10 * (0.2 - product_overlap / 100))


@torch.no_grad()
def dead_maps(maps: Tensor, reduction: str = "mean") -> Tensor | float:
    """The share of maps that are constant (all zero included), so that they point nowhere; less is better.

    Args:
        maps: `[B, K, h, w]`.
        reduction: "mean" or "none" (`[B, K]`, 1 for a dead map).

    Returns:
        A float in 0..1, or `[B, K]`.

    Raises:
        TypeError, ValueError: not `[B, K, h, w]`, not floating point, NaN.

    Example:
        >>> dead_maps(torch.stack([torch.eye(2), torch.zeros(2, 2)])[None])
        0.5
    """
    check_concept_maps(maps)
    return reduce(is_dead(maps).to(maps.dtype), reduction)
