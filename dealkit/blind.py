"""Explainers that look at nothing: the floor of every table. As `explain`, they take embeddings [K, D] or [B, K, D]."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def random_maps(vlm, images: Tensor, text_emb: Tensor) -> Tensor:
    """Control: maps of noise. The seed is a checksum of the image, so that they do not depend on the batch."""
    seeds = [zlib.crc32(image.numpy().tobytes()) for image in images.detach().float().cpu()]
    return torch.stack([torch.rand(text_emb.shape[-2], *vlm.grid, generator=torch.Generator().manual_seed(seed))
                        for seed in seeds]).to(images)


def centre_maps(vlm, images: Tensor, text_emb: Tensor) -> Tensor:
    """Control: the same bump in the middle of the image for every concept."""
    h, w = vlm.grid
    y, x = torch.linspace(-1, 1, h)[:, None], torch.linspace(-1, 1, w)
    return torch.exp(-4 * (x ** 2 + y ** 2)).expand(len(images), text_emb.shape[-2], h, w).to(images)


def uniform_maps(vlm, images: Tensor, text_emb: Tensor) -> Tensor:
    """Control: 1 everywhere. Its mass in a mask is the mask's area; it counts as dead, so that nothing overlaps.

    Insertion and deletion, which need an order, take its pixels from top left to bottom right.
    """
    return torch.ones(len(images), text_emb.shape[-2], *vlm.grid).to(images)


BLIND = {"random": random_maps, "centre": centre_maps, "uniform": uniform_maps}
