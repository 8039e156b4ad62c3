"""Do two maps of the same image rank its pixels alike? For maps of a model and of its randomised copy."""

from __future__ import annotations

import torch
from scipy.stats import rankdata
from torch import Tensor

from dealkit.metrics.reduction import check_concept_maps, reduce
from dealkit.normalize import at_least_float32, is_dead


@torch.no_grad()
def rank_correlation(maps: Tensor, others: Tensor, reduction: str = "mean") -> Tensor | float:
    """Spearman's rank correlation of two maps, pixel by pixel; equal values share their mean rank.

    Args:
        maps, others: `[B, K, h, w]` each; map k of image b is compared with map k of image b.
        reduction: "mean" or "none" (`[B, K]`).

    Returns:
        A float in -1..1, or `[B, K]`: 1 for the same order, 0 for unrelated maps; NaN where either map is dead.

    Raises:
        TypeError, ValueError: not `[B, K, h, w]`, shapes that differ, not floating point, NaN.

    Source: Spearman 1904; used to compare maps by Adebayo et al., "Sanity checks for saliency maps", NeurIPS 2018.

    Example:
        >>> maps = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
        >>> round(rank_correlation(maps, maps.exp()), 3), round(rank_correlation(maps, -maps), 3)
        (1.0, -1.0)
    """
    for values in (maps, others):
        check_concept_maps(values)
    if maps.shape != others.shape:
        raise ValueError(f"the maps have shapes {tuple(maps.shape)} and {tuple(others.shape)}; expected the same for "
                         "both: maps of the same images and concepts on one grid.")
    ranks = (torch.from_numpy(rankdata(at_least_float32(values.detach()).flatten(2).cpu(), axis=-1))
             for values in (maps, others))
    a, b = (rank - rank.mean(dim=-1, keepdim=True) for rank in ranks)
    correlation = (a * b).sum(dim=-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    undefined = (is_dead(maps) | is_dead(others)).cpu()
    return reduce(torch.where(undefined, torch.nan, correlation), reduction)
