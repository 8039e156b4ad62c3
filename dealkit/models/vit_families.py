"""open_clip's ViTs beside CLIP's own: pooled by an average (CLIPA), by attention (CoCa), or of custom blocks.

An average looks everywhere alike, so there the last tokens are read as a feature map.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dealkit.models.blocks import find_kind
from dealkit.models.pooled import Pooled, open_pooler, pooled_cuts
from dealkit.models.split import Family, Split, feature_split, only_last, unsupported
from dealkit.models.stack import Stack, stack_cuts
from dealkit.models.vit import vit_tokens


def find_vit_family(visual: VisionTransformer) -> Family:
    """The cuts of an open_clip ViT that is not CLIP's own; NotImplementedError for one that nothing here stands for."""
    grid, features = tuple(visual.grid_size), {"features": cut_last_tokens}
    if visual.attn_pool is not None:
        if visual.attn_pool_contrastive is not None:
            raise unsupported(f"an attention-pooled ViT of type {visual.attn_pool_type!r} (which open_clip itself has "
                              "not finished)")
        if visual.pool_type == "tok":
            return Family("attention-pooled ViT", grid, pooled_cuts(_pooled, cut_last_tokens))
        if visual.pool_type == "avg":  # many queries: no single row is what the embedding reads
            return Family("attention-pooled ViT with averaged queries", grid, features)
    if visual.pool_type == "avg":
        return Family("average-pooled ViT", grid, features)
    if visual.pool_type == "tok":
        find_kind(visual.transformer.resblocks[-1])
        return Family("CLS-pooled ViT with custom blocks", grid, stack_cuts(_stack))
    raise unsupported("a ViT without pooling, whose embedding is not one vector")


def cut_last_tokens(visual: VisionTransformer, images: Tensor, block: int = -1) -> Split:
    """Cut at the last patch tokens, `[B, width, h, w]`; the pooling and the projection follow."""
    only_last(block, "ViT", "its last tokens")
    tokens = vit_tokens(visual, images, len(visual.transformer.resblocks))
    cls, patches = tokens.tensor_split([1], dim=1)

    def head(features: Tensor) -> Tensor:
        tokens = features.flatten(2).mT
        if visual.attn_pool is not None:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative on a CPU
                pooled = visual.ln_post(visual.attn_pool(torch.cat([cls, tokens], dim=1)))
            return _project(visual, pooled[:, 0] if visual.pool_type == "tok" else pooled[:, 1:].mean(dim=1))
        if visual.final_ln_after_pool:
            return _project(visual, visual.ln_post(tokens.mean(dim=1)))
        return _project(visual, visual.ln_post(tokens).mean(dim=1))

    return feature_split(patches.mT.unflatten(2, tuple(visual.grid_size)), head)


def _pooled(visual: VisionTransformer) -> Pooled:
    """CoCa's ViT: query 0 over CLS and patches becomes the embedding, the other queries are for its captions."""
    def tokens(images: Tensor, only_last: bool) -> Iterator[Tensor]:
        blocks = visual.transformer.resblocks
        if only_last:
            yield vit_tokens(visual, images, len(blocks))
            return
        x = vit_tokens(visual, images, 0)
        save_memory = visual.transformer.grad_checkpointing and torch.is_grad_enabled()
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if save_memory else block(x)
            yield x

    def finish(pooled: Tensor) -> Tensor:
        return _project(visual, visual.ln_post(pooled)[:, 0])

    return Pooled(tokens, lambda tokens: open_pooler(visual.attn_pool, tokens, finish), prefix=1)


def _stack(visual: VisionTransformer) -> Stack:
    blocks = visual.transformer.resblocks
    return Stack(blocks, find_kind(blocks[-1]), lambda images: (vit_tokens(visual, images, 0), [{}] * len(blocks)),
                 lambda x: _project(visual, visual.ln_post(x[:, 0])), tuple(visual.grid_size),
                 grad_checkpointing=visual.transformer.grad_checkpointing)


def _project(visual: VisionTransformer, pooled: Tensor) -> Tensor:
    return pooled if visual.proj is None else pooled @ visual.proj
