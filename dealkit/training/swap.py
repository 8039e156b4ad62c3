"""Exchange what surrounds the concepts: explanations as masks, so that a background stops telling the category.

The regularisers of DEAL act on what the last layers look at. What a background tells has by then been mixed into the
tokens, and a penalty on the last block's map was not seen to take it out again. This acts on the images: where no
concept of an image is seen, its pixels come from other images of the batch, and so the background says less about the
caption. It needs no masks and no labels of backgrounds, only maps that are good enough.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dealkit.blind import BLIND
from dealkit.maps import VARIABLES, choose_method, contributions, to_maps
from dealkit.models import Tower
from dealkit.normalize import normalize_maps
from dealkit.training.precision import autocast, in_float32

DONORS = 3  # a place that is kept in the first donor, too, is asked for from the next one; what is left stays


def swap_method(tower: Tower, method: str | None) -> str:
    """Which maps say what to keep: those that see every block where the tower has them, else the paper's."""
    if method in BLIND:
        return method
    return choose_method(tower, "every_exit" if method is None and "every_exit" in tower.methods else method)


def kept_places(maps: Tensor, keep: float) -> Tensor:
    """The places where the union of the concept maps is highest.

    Args:
        maps: `[B, K, h, w]`; normalised inside.
        keep: share of the places.

    Returns:
        `[B, h, w]` bool, `round(keep * h * w)` places of each image, at least one.
    """
    union = normalize_maps(maps).amax(dim=1).flatten(1)
    highest = union.topk(max(1, round(keep * union.shape[1])), dim=1).indices
    return torch.zeros_like(union, dtype=torch.bool).scatter_(1, highest, True).unflatten(1, maps.shape[2:])


def exchange(images: Tensor, kept: Tensor, generator: torch.Generator) -> Tensor:
    """Images whose other places come from random images of the batch, at the same place, where those do not keep it.

    Args:
        images: `[B, 3, H, W]`. kept: `[B, h, w]` bool, on a grid that divides H and W evenly or nearly so.
        generator: on the CPU; of the donors.
    """
    kept = F.interpolate(kept[:, None].to(images), size=images.shape[2:], mode="nearest").bool()
    mixed, open_ = images, ~kept
    for _ in range(DONORS):
        donors = torch.randperm(len(images), generator=generator).to(images.device)
        other = donors != torch.arange(len(images), device=images.device)        # an image is no donor of its own
        taken = open_ & ~kept[donors] & other[:, None, None, None]
        mixed, open_ = torch.where(taken, images[donors], mixed), open_ & ~taken
    return mixed


@torch.no_grad()
def swap_surroundings(vlm, images: Tensor, concept_emb: Tensor, share: float, keep: float = 0.3,
                      method: str | None = None, generator: torch.Generator | None = None,
                      precision: str = "float32") -> Tensor:
    """Exchange the surroundings of a random share of the images.

    Args:
        vlm: the model whose maps decide; it is not changed.
        images: `[B, 3, H, W]`, normalised for the model.
        concept_emb: `[B, K, D]`, the concepts of each image.
        share: in [0, 1], the chance of each image. keep: share of each image's places that stay.
        method: of the maps; None is "every_exit", or the tower's own where it has no exits. "centre", "random" and
            "uniform" are controls that look at nothing.
        generator: on the CPU; None draws from torch's own. precision: of the trunk, see `DealConfig`.

    Returns:
        `[B, 3, H, W]`, the other images as they were.

    Source: ours. Combining parts of images by their explanations against spurious correlations: compare Noohdani et
    al., CVPR 2024 ("decompose and compose", DaC); without explanations: CutMix, Yun et al., ICCV 2019.
    """
    method = swap_method(vlm.tower, method)
    if method in BLIND:
        maps = BLIND[method](vlm, images, concept_emb)
    else:
        with autocast(vlm.device, precision):
            split = vlm.tower.split(images, kind=VARIABLES[method])
        maps = to_maps(contributions(in_float32(split, precision), concept_emb, vlm.tower.grid, method=method))
    mixed = exchange(images, kept_places(maps, keep), generator)
    chosen = torch.rand(len(images), generator=generator).to(images.device) < share
    return torch.where(chosen[:, None, None, None], mixed, images)
