"""Accuracy, over all images and in the group that fares worst."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dealkit.metrics.reduction import reduce


@torch.no_grad()
def accuracy(scores: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor | float:
    """Top-1 accuracy: the share of images whose highest score is that of their label.

    Args:
        scores: `[N, C]`, floating point, one column per category.
        labels: `[N]` integers in 0..C-1.
        reduction: "mean" or "none" (`[N]`, 1 for a right answer).

    Returns:
        A float in 0..1, or `[N]`.

    Raises:
        TypeError, ValueError: wrong shapes or dtypes, NaN scores, labels out of range.

    Example:
        >>> accuracy(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]))
        0.5
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise TypeError("scores must be a floating-point tensor [N, C], such as image_emb @ text_emb.T.")
    labels = torch.as_tensor(labels, device=scores.device)
    if scores.ndim != 2 or 0 in scores.shape or labels.shape != scores.shape[:1]:
        raise ValueError(f"scores have shape {tuple(scores.shape)}, labels {tuple(labels.shape)}; expected [N, C] and "
                         "[N] with N and C at least 1.")
    if labels.dtype == torch.bool or labels.is_floating_point():
        raise TypeError(f"labels have dtype {labels.dtype}; expected integers, one category per image.")
    if torch.isnan(scores).any():
        raise ValueError("scores hold NaN; an arg max over them would be arbitrary. Check the model.")
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise ValueError(f"labels run from {int(labels.min())} to {int(labels.max())}, but there are "
                         f"{scores.shape[1]} columns of scores; expected labels in 0..{scores.shape[1] - 1}.")
    return reduce((scores.argmax(dim=1) == labels).to(scores.dtype), reduction)


def worst_group_accuracy(correct: Tensor | np.ndarray, groups: Tensor | np.ndarray) -> float:
    """The accuracy of the group of images in which it is lowest: what an average over all images hides.

    Args:
        correct: `[N]`, 1 or True where the answer is right, 0 or False otherwise.
        groups: `[N]`, any label of a group (integers or strings), such as "land bird on water".

    Returns:
        A float in 0..1.

    Raises:
        ValueError: no images, lengths that differ, or values of `correct` outside 0..1.

    Source: Sagawa et al., "Distributionally robust neural networks for group shifts", ICLR 2020.

    Example:
        >>> worst_group_accuracy(torch.tensor([1, 1, 1, 0]), torch.tensor([0, 0, 1, 1]))
        0.5
    """
    correct, groups = _to_numpy(correct).astype(float), _to_numpy(groups)
    if correct.ndim != 1 or correct.shape != groups.shape or len(correct) == 0:
        raise ValueError(f"correct has shape {correct.shape}, groups {groups.shape}; expected [N] and [N], N >= 1.")
    if not np.all((correct >= 0) & (correct <= 1)):
        raise ValueError("correct holds NaN or values outside 0..1; expected 1 for a right answer, 0 for a wrong one.")
    _, group = np.unique(groups, return_inverse=True)
    return float((np.bincount(group, weights=correct) / np.bincount(group)).min())


def _to_numpy(values: Tensor | np.ndarray) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
