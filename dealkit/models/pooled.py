"""Where a ViT is cut whose embedding is read by a pooling attention: CoCa, SigLIP, Perception Encoder.

A pooling attention has a learned query, and its row over the tokens is to such a tower what the CLS row is to CLIP's:
where the embedding is read from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from open_clip.transformer import AttentionalPooler
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from dealkit.models.opened import OpenAttention, context_split, exits_split, on, row_split
from dealkit.models.split import Cut, Split, merge_heads, only_last, per_head


@dataclass(frozen=True)
class Pooled:
    """An attention-pooled ViT, taken apart.

    Attributes:
        tokens: images -> what is pooled after each block `[B, prefix + h*w, width]`, first to last, and whether only
            the last is wanted.
        open: such tokens -> the pooling attention of the query that becomes the embedding.
        prefix: tokens among them that are no patches; they stand first.
    """

    tokens: Callable[[Tensor, bool], Iterator[Tensor]]
    open: Callable[[Tensor], OpenAttention]
    prefix: int


def pooled_cuts(take_apart: Callable[[nn.Module], Pooled], features: Cut) -> dict[str, Cut]:
    """All cuts of the towers that `take_apart` makes a Pooled of; `features` cuts them at their last tokens."""
    return {"attention": on(take_apart, cut_pooled_attention), "features": features,
            "context": on(take_apart, cut_pooled_context), "exits": on(take_apart, cut_pooled_exits)}


def cut_pooled_attention(pooled: Pooled, images: Tensor, block: int = -1) -> Split:
    """Cut at the query's row over the tokens."""
    return row_split(_open_last(pooled, images, block), pooled.prefix)


def cut_pooled_context(pooled: Pooled, images: Tensor, block: int = -1) -> Split:
    """Cut at what the query reads."""
    return context_split(_open_last(pooled, images, block), pooled.prefix)


def cut_pooled_exits(pooled: Pooled, images: Tensor, block: int = -1) -> Split:
    """Cut at the query's row over the tokens after every block: an exit pools those as the tower pools its last."""
    only_last(block, "attention-pooled ViT", "all its blocks at once")
    return exits_split([row_split(pooled.open(tokens), pooled.prefix) for tokens in pooled.tokens(images, False)])


def open_pooler(pool: AttentionalPooler, tokens: Tensor, finish: Callable[[Tensor], Tensor]) -> OpenAttention:
    """open_clip's pooling attention for its first query; `finish`: what it gives, `[B, 1, width]`, -> embedding."""
    attn = pool.attn
    keys, query = pool.ln_k(tokens), pool.ln_q(pool.query)[None, :1]
    if attn.in_proj_weight is None:  # tokens and queries differ in width
        weights = attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight
    else:
        weights = attn.in_proj_weight.chunk(3)
    q, k, v = (per_head(F.linear(x, weight, bias), attn.num_heads)
               for x, weight, bias in zip((query, keys, keys), weights, attn.in_proj_bias.chunk(3)))
    return OpenAttention(q, k, v, lambda context: finish(attn.out_proj(merge_heads(context))))


def open_latent(pool: AttentionPoolLatent, tokens: Tensor, finish: Callable[[Tensor], Tensor]) -> OpenAttention:
    """timm's pooling attention for its first latent query; `finish` as in `open_pooler`."""
    x = tokens if pool.pos_embed is None else tokens + pool.pos_embed[None].to(tokens.dtype)
    keys, values = pool.kv(x).chunk(2, dim=-1)
    q = pool.q_norm(per_head(pool.q(pool.latent[:, :1]), pool.num_heads))

    def after(context: Tensor) -> Tensor:
        x = pool.proj_drop(pool.proj(merge_heads(context)))
        return finish(x if pool.mlp is None else x + pool.mlp(pool.norm(x)))

    return OpenAttention(q, pool.k_norm(per_head(keys, pool.num_heads)), per_head(values, pool.num_heads), after)


def _open_last(pooled: Pooled, images: Tensor, block: int) -> OpenAttention:
    only_last(block, "attention-pooled ViT", "its pooling attention")
    last, = pooled.tokens(images, True)
    return pooled.open(last)
