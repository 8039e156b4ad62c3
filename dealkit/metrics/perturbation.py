"""What happens to the score, and to the map, when the image changes a little: two measures of Yeh et al. (2019).

Infidelity asks whether a map predicts how the score changes, max-sensitivity whether the map itself keeps still. Both
are computed by `captum.metrics`. They are estimates from a few random changes; equal seeds make equal changes, so that
methods and models are compared on the same ones, and the changes are the same for every image, so that an image's
number does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable

import captum.metrics
import torch
import torch.nn.functional as F
from torch import Tensor

from dealkit.metrics.faithfulness import Score, checked_scores, without_content
from dealkit.metrics.reduction import check_concept_maps, check_images, check_maps_of_images, reduce

Explain = Callable[[Tensor], Tensor]  # explain(images [B, C, H, W]) -> maps [B, K, h, w]


@torch.no_grad()
def infidelity(score: Score, images: Tensor, maps: Tensor, n: int = 16, seed: int = 0, removed: Tensor | None = None,
               baseline: str = "blur", normalize: bool = True, reduction: str = "mean") -> Tensor | float:
    """How badly the map predicts the drop of the score when squares of the image are taken away; less is better.

    The mean over squares of (map's sum over the square - drop of the score)^2: "square removal", with a cell of the
    map's grid as the unit that is there or not. It is 0 if the drop of every square is the sum of its cells.

    Args:
        score: score(images `[B, C, H, W]`, k) -> `[B]`. For one change it gets the very same tensor for every k, so a
            score that remembers the embedding of its last images pays n + 1 passes for all concepts.
        images: `[B, C, H, W]`.
        maps: `[B, K, h, w]`; map k of image b explains score(images, k)[b].
        n: number of squares. seed: of their sides (1 cell to half of the grid) and places.
        removed: which cells to take away instead, `[n, h, w]` bool.
        baseline: what comes in their place, "blur" or "mean"; see `without_content`.
        normalize: scale each map by the factor that suits it best (Yeh et al., as in their code), because the unit of a
            map is seldom that of the score. The factor may be negative: a map and its opposite score the same. False
            takes the values as they are.
        reduction: "mean" or "none" (`[B, K]`).

    Returns:
        A float >= 0 in squared units of the score, or `[B, K]`. The unit makes it a measure for methods on one model;
        another model may have other scores. A dead map that is zero has the mean square of the drops.

    Raises:
        TypeError, ValueError: maps, images or scores that do not match, maps finer than the images, n < 1, `removed` of
            another shape or dtype.

    Source: Yeh et al., "On the (in)fidelity and sensitivity of explanations", NeurIPS 2019, definition 2.1.

    Example:
        >>> weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]])             # a score that adds up four pixels, and a map
        >>> images = torch.eye(2)[None, None]                            # that knows by how much they differ from
        >>> maps = (weights * (images - images.mean()))                  # the baseline
        >>> infidelity(lambda x, k: (x * weights).sum(dim=(1, 2, 3)), images, maps, baseline="mean", normalize=False)
        0.0
    """
    check_maps_of_images(maps, images)
    gone = without_content(images, baseline)
    grid, pairs = maps.shape[-2:], maps.shape[0] * maps.shape[1]
    removed = _squares(grid, n, seed) if removed is None else _checked_cells(removed, grid)

    def without(cells: Tensor) -> Tensor:
        """The image where a cell is 1, the baseline where it is 0."""
        # a pixel belongs to the cell that its centre lies in ("nearest" would ask for its corner)
        fine = F.interpolate(cells[None, None], size=images.shape[-2:], mode="nearest-exact")[0, 0]
        return torch.where(fine.bool().to(images.device), images, gone)

    # Captum's input is the grid of cells, all of them there (1); its examples are the pairs of an image and a concept.
    def forward(cells: Tensor) -> Tensor:
        changes = cells.unflatten(0, (pairs, -1))[0]  # the same for every pair
        rows = [[checked_scores(score, changed, k) for k in range(maps.shape[1])] for changed in map(without, changes)]
        return torch.stack([torch.stack(row, dim=1).flatten() for row in rows], dim=1).flatten().cpu().double()

    def perturb(cells: Tensor) -> tuple[Tensor, Tensor]:
        taken = removed.double().repeat(pairs, 1, 1)
        return taken, cells - taken

    values = maps.detach().cpu().double().flatten(0, 1)
    if normalize:  # any scale gives the same result, and this one keeps tiny maps away from underflow
        top = values.abs().amax(dim=(-2, -1), keepdim=True)
        values = values / torch.where(top > 0, top, 1.0)
    result = captum.metrics.infidelity(forward, perturb, torch.ones_like(values), values,
                                       n_perturb_samples=len(removed), normalize=normalize)
    return reduce(result.clamp(min=0).view(maps.shape[:2]), reduction)


@torch.no_grad()
def max_sensitivity(explain: Explain, images: Tensor, radius: float = 0.02, n: int = 8, seed: int = 0,
                    reduction: str = "mean") -> Tensor | float:
    """How far the map moves, at most, when noise is added to the image that nobody would see; less is better.

    The maximum over n noisy copies of |map of the copy - map| / |map|, with the Euclidean norm over pixels. A map that
    ignores the image is perfectly stable: read it beside a faithfulness.

    Args:
        explain: explain(images `[B, C, H, W]`) -> maps `[B, K, h, w]`; called n + 1 times.
        images: `[B, C, H, W]`.
        radius: every value of a copy differs by at most this, uniformly; in the unit of the images as they are passed
            (after a model's normalisation 0.02 is about 1.4 of 255 grey levels, without it 5.1).
        n: number of copies. seed: of their noise.
        reduction: "mean" or "none" (`[B, K]`).

    Returns:
        A float >= 0 in units of the map's own norm, or `[B, K]`; NaN where the map of the image itself is all zero.

    Raises:
        TypeError, ValueError: images that are not floating point, explain gives no maps `[B, K, h, w]` of them, n < 1,
            a radius that is not positive.

    Source: Yeh et al., NeurIPS 2019, definition 2.2 (SENS_MAX), estimated by sampling as there.

    Example:
        >>> images = torch.rand(2, 3, 8, 8)
        >>> max_sensitivity(lambda x: torch.ones(2, 5, 4, 4), images)
        0.0
    """
    if n < 1 or not radius > 0:
        raise ValueError(f"n = {n}, radius = {radius}; expected n >= 1 noisy copies and a positive radius.")
    check_images(images)
    generator = torch.Generator().manual_seed(seed)
    noise = [(2 * torch.rand(images.shape[1:], generator=generator) - 1) * radius for _ in range(n)]
    runs = [explain(images), *(explain(images + once.to(images)) for once in noise)]
    for maps in runs:
        check_concept_maps(maps)
        if maps.shape != runs[0].shape or len(maps) != len(images):
            raise ValueError(f"explain gave maps {tuple(maps.shape)} for {len(images)} images; expected [B, K, h, w] "
                             "with a row for each image and one shape in every call.")
    maps = torch.stack([maps.detach().cpu().double() for maps in runs]).flatten(1, 2)  # [n + 1, B*K, h, w]
    maps = maps / maps[0].abs().amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    pairs = maps.shape[1]

    # One call explained all concepts, but Captum has one number per example. So its examples are the pairs of an image
    # and a concept, each given by its number and that of the run, and its explanation is to look the pair's map up.
    def look_up(index: Tensor | tuple[Tensor]) -> tuple[Tensor]:
        run, pair = (index[0] if isinstance(index, tuple) else index).unbind(dim=1)
        return (maps[run, pair],)

    def perturb(index: Tensor) -> Tensor:
        return torch.stack([torch.arange(1, n + 1).repeat(pairs), index[:, 1]], dim=1)

    index = torch.stack([torch.zeros(pairs, dtype=torch.long), torch.arange(pairs)], dim=1)
    result = captum.metrics.sensitivity_max(look_up, index, perturb, n_perturb_samples=n)
    result = torch.where(maps[0].any(dim=-1).any(dim=-1), result, torch.nan)
    return reduce(result.view(runs[0].shape[:2]), reduction)


def _squares(grid: tuple[int, int], n: int, seed: int) -> Tensor:
    """n squares at random places, `[n, h, w]` bool, with sides of 1 to half of the shorter side of the grid."""
    if n < 1:
        raise ValueError(f"n = {n}; expected at least one square.")
    generator = torch.Generator().manual_seed(seed)
    removed = torch.zeros(n, *grid, dtype=torch.bool)
    for cells in removed:
        side = int(torch.randint(1, max(1, min(grid) // 2) + 1, (), generator=generator))
        top, left = (int(torch.randint(length - side + 1, (), generator=generator)) for length in grid)
        cells[top:top + side, left:left + side] = True
    return removed


def _checked_cells(removed: Tensor, grid: tuple[int, int]) -> Tensor:
    if not isinstance(removed, Tensor) or removed.dtype != torch.bool or removed.ndim != 3 or \
            removed.shape[1:] != grid or len(removed) == 0:
        found = f"{removed.dtype} {tuple(removed.shape)}" if isinstance(removed, Tensor) else type(removed).__name__
        raise ValueError(f"removed is {found}; expected a bool tensor [n, h, w] on the maps' grid {tuple(grid)}.")
    return removed.cpu()
