"""Retrieval: is what one looks for among the first k?"""

from __future__ import annotations

import torch
from torch import Tensor

from dealkit.metrics.reduction import reduce


@torch.no_grad()
def recall_at_k(scores: Tensor, relevant: Tensor, k: int, reduction: str = "mean") -> Tensor | float:
    """The share of queries that find at least one relevant item among the k items with the highest scores.

    Args:
        scores: `[N, M]`, floating point: N queries, M items.
        relevant: `[N, M]` bool: is the item what the query looks for?
        k: how many items are looked at; with k >= M every query that has a relevant item finds it.
        reduction: "mean" or "none" (`[N]`, 1 for a hit).

    Returns:
        A float in 0..1, or `[N]`; a query without any relevant item is NaN and left out of the mean.

    Raises:
        TypeError, ValueError: wrong shapes or dtypes, NaN scores, k < 1.

    Source: "Recall@k" of CLIP (Radford et al., ICML 2021, zero-shot retrieval), after Karpathy and Fei-Fei, CVPR 2015.

    Example:
        >>> scores = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
        >>> relevant = torch.tensor([[True, False, False], [False, True, False]])
        >>> recall_at_k(scores, relevant, 1), recall_at_k(scores, relevant, 2)
        (0.5, 1.0)
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k is {k!r}; expected a whole number of items, at least 1.")
    ranks = first_relevant(scores, relevant)
    return reduce((ranks <= k).to(ranks).masked_fill(ranks.isnan(), torch.nan), reduction)


@torch.no_grad()
def first_relevant(scores: Tensor, relevant: Tensor) -> Tensor:
    """The place, from 1, of the first relevant item in each query's ranking: `[N]` float64, NaN where there is none.

    Items with equal scores have no order. The irrelevant ones come first here, so that a model which scores everything
    the same finds nothing instead of everything.

    Args, raises: as `recall_at_k`.

    Example:
        >>> first_relevant(torch.tensor([[0.9, 0.5, 0.5]]), torch.tensor([[False, True, False]])).tolist()
        [3.0]
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise TypeError("scores must be a floating-point tensor [N, M], such as image_emb @ text_emb.T.")
    if not isinstance(relevant, Tensor) or relevant.dtype != torch.bool:
        found = relevant.dtype if isinstance(relevant, Tensor) else type(relevant).__name__
        raise TypeError(f"relevant is {found}; expected a bool tensor [N, M], True where the item is right.")
    if scores.ndim != 2 or 0 in scores.shape or relevant.shape != scores.shape:
        raise ValueError(f"scores have shape {tuple(scores.shape)}, relevant {tuple(relevant.shape)}; expected [N, M] "
                         "twice, with N and M at least 1.")
    if torch.isnan(scores).any():
        raise ValueError("scores hold NaN; an order of them would be arbitrary. Check the model.")
    relevant = relevant.to(scores.device)
    best = scores.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
    ahead = ((scores >= best) & ~relevant).sum(dim=1).double()
    return (ahead + 1).masked_fill(~relevant.any(dim=1), torch.nan)
