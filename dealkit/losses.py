"""The terms of DEAL's risk, each a function of plain tensors.

    risk = contrastive + lambda * disentangle + gamma * localize            (DEAL, Li et al., ECCV 2024)

Maps may be raw or normalised: every term that needs the range 0..1 stretches each map itself, which is idempotent.
A NaN in the input comes out as a NaN loss, for the training loop to stop at; nothing is dropped here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dealkit.normalize import (at_least_float32, check_maps, check_option, normalize_maps, overlap_per_image,
                               smallest_range)

AGGREGATES = ("sum", "max")


def contrastive_loss(image_emb: Tensor, text_emb: Tensor, logit_scale: Tensor | float,
                     labels: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE: text i is the right one for image i among the texts of the batch, and the other way round.

    Without `labels` this is CLIP's loss. Two images of one class then count as negatives of each other although both
    captions are true; `labels` removes these pairs from both denominators.

    Args:
        image_emb: `[B, D]`, unit norm, as `vlm.encode_image` returns it.
        text_emb: `[B, D]`, unit norm; row i belongs to image i.
        logit_scale: factor on the cosines (1 / temperature), a number or scalar tensor, already exponentiated.
        labels: `[B]` integer classes; or `[B, B]` bool, True at [i, j] where text j is true of image i. The diagonal
            is the positive pair in either case.

    Returns:
        A scalar: the mean of the two cross-entropies, in nats.

    Raises:
        TypeError, ValueError: shapes that do not match, an empty batch, embeddings or labels of the wrong dtype.

    Source: Radford et al., 2021, figure 3; masking same-class pairs: compare UniCL (Yang et al., 2022).

    Example:
        >>> contrastive_loss(torch.eye(2), torch.eye(2), 1.0)    # log(1 + 1/e)
        tensor(0.3133)
    """
    check_maps(image_emb, "image_emb", "[B, D]")
    check_maps(text_emb, "text_emb", "[B, D]")
    if image_emb.shape != text_emb.shape:
        raise ValueError(f"image_emb {tuple(image_emb.shape)} and text_emb {tuple(text_emb.shape)} differ; "
                         "expected one text per image, both [B, D].")
    logits = logit_scale * image_emb @ text_emb.T  # [B images, B texts]
    if labels is not None:
        logits = logits.masked_fill(_true_off_diagonal(labels, logits), float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def disentangle_loss(concept_maps: Tensor, overlap: str = "product") -> Tensor:
    """Push the concept maps of one image apart: their overlap, averaged over the batch.

    Args:
        concept_maps: `[B, K, h, w]`, K >= 2, non-negative or already normalised.
        overlap: "product" (the paper's): sum over pairs i < j and over pixels of h_i h_j. "cosine": mean over pairs of
            the cosine of the flattened maps. "soft_iou": mean over pairs of sum min(h_i, h_j) / sum max(h_i, h_j). The
            last two do not depend on grid size and K.

    Returns:
        A scalar >= 0. "cosine" and "soft_iou" are at most 1; "product" at most K (K - 1) / 2 * h * w.

    Raises:
        TypeError, ValueError: not `[B, K >= 2, h, w]`, not floating point, an unknown overlap.

    Source: `R_disentangle` of DEAL. The cosine is ours; like the same authors' DCP (NeurIPS 2024) it does not depend on
    the grid. So is the use of the soft intersection over union (Rahman and Wang, 2016, with min and max).

    Example:
        >>> one, other = torch.eye(2), 1 - torch.eye(2)
        >>> disentangle_loss(torch.stack([one, one, other])[None])
        tensor(2.)
    """
    check_maps(concept_maps, "concept_maps", "[B, K, h, w]")
    return overlap_per_image(concept_maps, overlap).mean()


def localize_loss(concept_maps: Tensor, category_maps: Tensor, aggregate: str = "sum") -> Tensor:
    """Keep the concept maps together on what the category map shows.

    Per image, the sum over pixels of (aggregate_i h_i - h_category)^2. Every map is normalised, the aggregate is not.

    Args:
        concept_maps: `[B, K, h, w]`, K >= 1.
        category_maps: `[B, h, w]`, on the same grid.
        aggregate: "sum" over concepts (the paper's; where maps overlap it exceeds 1, so it also asks for sparse maps),
            or "max" over concepts (a union).

    Returns:
        A scalar >= 0, the mean over the batch.

    Raises:
        TypeError, ValueError: wrong rank, batches or grids that do not match, not floating point, unknown aggregate.

    Source: `R_localize` of DEAL; "max" is ours.

    Example:
        >>> one, other = torch.eye(2), 1 - torch.eye(2)
        >>> localize_loss(torch.stack([one, other])[None], one[None])    # two pixels too many
        tensor(2.)
    """
    check_maps(concept_maps, "concept_maps", "[B, K, h, w]")
    check_maps(category_maps, "category_maps", "[B, h, w]")
    check_option(aggregate, AGGREGATES, "aggregate")
    if concept_maps.shape[0] != category_maps.shape[0]:
        raise ValueError(f"concept_maps hold {concept_maps.shape[0]} images, category_maps {category_maps.shape[0]}; "
                         "expected the same batch in both.")
    if concept_maps.shape[2:] != category_maps.shape[1:]:
        raise ValueError(f"concept maps are on a {tuple(concept_maps.shape[2:])} grid, category maps on "
                         f"{tuple(category_maps.shape[1:])}; explain both with the same model and method.")
    concepts = normalize_maps(concept_maps)
    together = concepts.sum(dim=1) if aggregate == "sum" else concepts.amax(dim=1)
    return (together - normalize_maps(category_maps)).square().sum(dim=(1, 2)).mean()


def guard_loss(signed_maps: Tensor, share: float = 0.3) -> Tensor:
    """Keep maps alive: a penalty once less than `share` of a map's evidence is positive.

    `disentangle_loss` is content with maps that are all zero, and once the ReLU has zeroed a map no gradient is left
    to revive it. So this term reads the map before the ReLU: relu(share - positive mass / total absolute mass).
    Where no pixel is positive that share is flat at 0. There, and only there, the distance of the highest pixel below
    zero, in units of the map's mean absolute value, is added: its gradient lifts that pixel until the share takes over.

    Args:
        signed_maps: `[B, K, h, w]`, before the ReLU (`explain(..., signed=True)`); not normalised.
        share: the wanted positive share, from 0 (only maps without a positive pixel are penalised) to 1.

    Returns:
        A scalar, the mean over all maps: each 0..share, or up to share + 1 without any positive pixel. A map that is
        zero everywhere counts as positive share 0.

    Raises:
        TypeError, ValueError: not `[B, K, h, w]`, not floating point, `share` outside 0..1.

    Source: ours; not in the paper.

    Example:
        >>> guard_loss(torch.tensor([[[[1.0, -9.0]]]]))    # a tenth is positive; 0.3 is wanted
        tensor(0.2000)
    """
    check_maps(signed_maps, "signed_maps", "[B, K, h, w]")
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; expected a number from 0 to 1.")
    values = at_least_float32(signed_maps)
    positive = values.relu().sum(dim=(-2, -1))
    total = values.abs().sum(dim=(-2, -1))
    empty = total <= smallest_range(values.dtype)
    total = torch.where(empty, 1.0, total)
    positive_share = torch.where(empty, 0.0, positive / total)
    below_zero = (-values.amax(dim=(-2, -1))).relu()
    # The unit is a constant: with a gradient it would push the other pixels further below zero.
    unit = (total / values[0, 0].numel()).detach()
    return ((share - positive_share).relu() + torch.where(empty, 0.0, below_zero / unit)).mean()


def _true_off_diagonal(labels: Tensor, logits: Tensor) -> Tensor:
    """`[B, B]` bool: pairs off the diagonal whose text is nevertheless true of the image."""
    size = len(logits)
    labels = torch.as_tensor(labels, device=logits.device)
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels have dtype {labels.dtype}; expected integer classes [B] or a bool matrix [B, B].")
    expected = (size, size) if labels.dtype == torch.bool else (size,)
    if tuple(labels.shape) != expected:
        raise ValueError(f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; expected integers of "
                         f"shape ({size},), one class per image, or bools of shape ({size}, {size}).")
    same = labels if labels.dtype == torch.bool else labels[:, None] == labels[None, :]
    return same & ~torch.eye(size, dtype=torch.bool, device=logits.device)
