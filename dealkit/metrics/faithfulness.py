"""Faithfulness: does the score of a concept depend on the pixels that its map marks?

Pixels are exchanged between an image and a baseline, a copy of it without content, in the order of the map, every
channel of a pixel at once. The map of concept k of image b orders the pixels of image b, for the score of concept k.
Which baseline is right is disputed: a blur keeps the colours of a part, one colour makes edges that no photograph has.
A claim should hold for both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dealkit.metrics.reduction import check_images, check_maps_of_images, levels, reduce
from dealkit.normalize import check_option

BASELINES = ("blur", "mean")
Score = Callable[[Tensor, int], Tensor]  # score(images [B, 3, H, W], k) -> [B], the score of concept k for each image


@torch.no_grad()
def blur(images: Tensor, share: float = 1 / 8) -> Tensor:
    """Blur images with a wide Gaussian until colours and shapes of parts are gone: the baseline without content.

    Args:
        images: `[B, C, H, W]`, floating point.
        share: standard deviation of the Gaussian as a share of the image's side; 1/8 is 10 pixels of 80, 28 of 224.
            The kernel covers the whole image; at the border it is cut off and scaled back to sum 1, nothing is padded.

    Returns:
        A tensor of the same shape. A constant image stays as it is.

    Raises:
        TypeError, ValueError: not `[B, C, H, W]`, not floating point, `share` not positive.

    Example:
        >>> blur(torch.full((1, 3, 8, 8), 0.5)).allclose(torch.tensor(0.5))
        True
    """
    check_images(images)
    if not share > 0:
        raise ValueError(f"share is {share}; expected a positive share of the image's side, such as 1/8.")
    # A Gaussian is separable, so a blur is two matrix products: one mixes the rows, the other the columns.
    rows, columns = (_gaussian_matrix(side, share).to(images) for side in images.shape[-2:])
    return rows @ images @ columns.T


def without_content(images: Tensor, baseline: str = "blur") -> Tensor:
    """What stands in for pixels that are taken away.

    Args:
        images: `[B, C, H, W]`, floating point.
        baseline: "blur": see `blur`. "mean": every pixel has the mean colour of its own image, per channel. The image's
            own mean rather than 0, because 0 is the mean colour only after a normalisation that Birdworld lacks.

    Returns:
        A tensor of the same shape.

    Raises:
        TypeError, ValueError: as `blur`; an unknown baseline.

    Example:
        >>> without_content(torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]]), "mean").unique()
        tensor([0.5000])
    """
    check_option(baseline, BASELINES, "baseline")
    if baseline == "blur":
        return blur(images)
    check_images(images)
    return images.detach().mean(dim=(-2, -1), keepdim=True).expand_as(images)


@torch.no_grad()
def replacement_curve(score: Score, start: Tensor, end: Tensor, maps: Tensor, steps: int) -> Tensor:
    """Scores while the pixels of `start` are replaced by those of `end`, from the map's highest pixel to its lowest.

    After step t the first round(t / steps * H * W) pixels come from `end`, all channels of them; step 0 is `start`, the
    last step is `end` exactly. Equal values of a map (up to a millionth of its range) go from top left to bottom
    right.

    Args:
        score: score(images `[B, C, H, W]`, k) -> `[B]`. At both ends it gets the very same tensor for every k, so a
            score that remembers the embedding of its last images pays one pass for all concepts there.
        start, end: `[B, C, H, W]`.
        maps: `[B, K, h, w]`; up-sampled bilinearly.
        steps: number of equal portions, at least 1.

    Returns:
        `[steps + 1, B, K]`.

    Raises:
        TypeError, ValueError: batches or shapes that do not match, maps finer than the images, NaN, fewer than 1 or
            too many steps, a score that is not `[B]` or not finite.
    """
    check_images(end)
    check_maps_of_images(maps, start)
    if start.shape != end.shape:
        raise ValueError(f"images {tuple(start.shape)} and their replacement {tuple(end.shape)} do not match; expected "
                         "one for each image, in the same order.")
    batch, concepts, pixels = len(maps), maps.shape[1], start.shape[-2] * start.shape[-1]
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= pixels:
        raise ValueError(f"steps is {steps!r}; expected a whole number from 1 to the {pixels} pixels of an image.")
    order = levels(maps, start.shape[-2:]).flatten(2).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(pixels, device=order.device).expand_as(order))
    rank = rank.view(batch, concepts, 1, *start.shape[-2:])  # [B, K, 1, H, W]: the axis of 1 covers all channels

    curve = [[checked_scores(score, start, k) for k in range(concepts)]]
    for step in range(1, steps):
        replaced = rank < round(step / steps * pixels)
        curve.append([checked_scores(score, torch.where(replaced[:, k], end, start), k) for k in range(concepts)])
    curve.append([checked_scores(score, end, k) for k in range(concepts)])
    return torch.stack([torch.stack(row, dim=-1) for row in curve])


@torch.no_grad()
def insertion_fidelity(score: Score, images: Tensor, maps: Tensor, steps: int = 5,
                       reduction: str = "mean") -> Tensor | float:
    """The paper's localizability: how soon the score of the image returns as its pixels are inserted into its blur.

    The mean over steps 1..steps of clamp(|s - s_blur| / |s_image - s_blur|, 0, 1). The last step is the image itself,
    so the result is at least 1 / steps. A change in the wrong direction counts as well; `insertion_auc` is stricter.

    Args:
        score: score(images `[B, C, H, W]`, k) -> `[B]`, such as the cosine with concept k (of each image).
        images: `[B, C, H, W]`.
        maps: `[B, K, h, w]`, map k of image b explains score(images, k)[b].
        steps: equal portions of pixels.
        reduction: "mean" or "none" (`[B, K]`).

    Returns:
        A float in 0..1, or `[B, K]`; NaN where blurring does not change the score (beyond rounding).

    Raises:
        TypeError, ValueError: as `replacement_curve`; unknown reduction.

    Source: "localizability" of DEAL (Li et al., ECCV 2024).

    Example:
        >>> images = torch.zeros(1, 3, 8, 8)
        >>> images[..., :2] = 1.0                                    # a bright bar on the left
        >>> maps = images[:, :1]                                     # and a map that knows it
        >>> insertion_fidelity(lambda x, k: x[..., :2].mean(dim=(1, 2, 3)), images, maps, steps=4)
        1.0
    """
    curve = replacement_curve(score, blur(images), images, maps, steps)
    returned, whole = (curve[1:] - curve[0]).abs(), (curve[-1] - curve[0]).abs()
    fidelity = (returned / whole).clamp(0, 1).mean(dim=0)
    # A difference of a few roundings is none: dividing by it would make a fidelity out of noise.
    rounding = 8 * torch.finfo(curve.dtype).eps * torch.maximum(curve[0].abs(), curve[-1].abs())
    return reduce(torch.where(whole > rounding, fidelity, float("nan")), reduction)


@torch.no_grad()
def insertion_auc(score: Score, images: Tensor, maps: Tensor, steps: int = 10, reduction: str = "mean",
                  baseline: str = "blur") -> Tensor | float:
    """Area under the score while the image's pixels are inserted into its baseline, best first; more is better.

    Args:
        score, images, maps, reduction: as `insertion_fidelity`.
        steps: equal portions of pixels; the area is the trapezoid rule over the inserted fraction 0..1.
        baseline: "blur" or "mean", see `without_content`.

    Returns:
        A float in the unit of the score (its mean along the curve), or `[B, K]`.

    Raises:
        TypeError, ValueError: as `replacement_curve`; unknown reduction or baseline.

    Source: Petsiuk et al., "RISE", BMVC 2018.
    """
    curve = replacement_curve(score, without_content(images, baseline), images, maps, steps)
    return reduce(torch.trapezoid(curve, dx=1 / steps, dim=0), reduction)


@torch.no_grad()
def deletion_auc(score: Score, images: Tensor, maps: Tensor, steps: int = 10, reduction: str = "mean",
                 baseline: str = "blur") -> Tensor | float:
    """Area under the score while the image's pixels are replaced by its baseline, best first; less is better.

    Arguments, result, errors and source as `insertion_auc`.
    """
    curve = replacement_curve(score, images, without_content(images, baseline), maps, steps)
    return reduce(torch.trapezoid(curve, dx=1 / steps, dim=0), reduction)


def _gaussian_matrix(side: int, share: float) -> Tensor:
    """`[side, side]`; row i holds the weights with which pixel i mixes all pixels, and sums to 1."""
    place = torch.arange(side, dtype=torch.float64)
    distance = (place[:, None] - place[None, :]) / (share * side)
    return torch.softmax(-distance.square() / 2, dim=1)


def checked_scores(score: Score, images: Tensor, k: int) -> Tensor:
    """score(images, k) `[B]`; ValueError where it has another shape or is not finite."""
    scores = score(images, k)
    if not isinstance(scores, Tensor) or scores.shape != (len(images),) or not scores.is_floating_point():
        found = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"score(images, {k}) gave {found}; expected floating point of shape ({len(images)},): "
                         "the score of that concept for each image.")
    if not torch.isfinite(scores).all():
        raise ValueError(f"score(images, {k}) is NaN or infinite; check the model and the images first.")
    return scores
