"""What happens inside a transformer block, for the kinds of block that open_clip and timm have beside CLIP's own.

A cut at the attention of a block needs the block in four steps, each of them the stock modules called as they are:

    tokens = enter(block, x)                             # what the attention reads
    q, k, v, bias = project(attention, tokens, **extras)
    read = merge(attention, context, tokens)             # context: softmax(q k / sqrt(d) + bias) v
    x = leave(block, x, read)

`extras` are the keyword arguments of the stock block, such as rotary embeddings. A new kind of block is four such
functions. Dropout on the attention itself, which is 0 in every configuration of open_clip, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip.transformer import Attention, CustomResidualAttentionBlock
from timm.layers import Attention as TimmAttention
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock
from torch import Tensor, nn

from dealkit.models.split import merge_heads, per_head, unsupported

Projected = tuple[Tensor, Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class BlockKind:
    """The four steps of a kind of block (see above), where its attention is, and how its stock module is called."""

    enter: Callable[[nn.Module, Tensor], Tensor]
    project: Callable[..., Projected]
    merge: Callable[[nn.Module, Tensor, Tensor], Tensor]
    leave: Callable[[nn.Module, Tensor, Tensor], Tensor]
    attention: Callable[[nn.Module], nn.Module] = lambda block: block.attn
    run: Callable[..., Tensor] = lambda block, x, **extras: block(x, **extras)


def find_kind(block: nn.Module) -> BlockKind:
    """The steps of a stock block.

    Raises:
        NotImplementedError: a kind of block, or an option of its attention, that nothing here stands for.
    """
    attention = getattr(block, "attn", None)
    kind = KINDS.get(type(block))
    if kind is None or type(attention) not in ATTENTIONS:
        raise unsupported(f"a ViT with blocks of kind {type(block).__name__} ({type(attention).__name__})")
    if isinstance(attention, Attention) and attention.logit_scale is not None:
        raise unsupported("a ViT with scaled cosine attention (which open_clip itself cannot run)")
    if getattr(attention, "gate", None) is not None or getattr(attention, "num_kv_groups", 1) > 1:
        raise unsupported("a ViT with gated or grouped-query attention")
    return kind


def _project_open_clip(attn: Attention, tokens: Tensor) -> Projected:
    stacked = F.linear(tokens, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (per_head(x, attn.num_heads) for x in stacked)
    return attn.ln_q(q), attn.ln_k(k), v, None


def _merge_open_clip(attn: Attention, context: Tensor, tokens: Tensor) -> Tensor:
    context = context if attn.head_scale is None else context * attn.head_scale
    return attn.out_drop(attn.out_proj(attn.ln_inner(merge_heads(context))))


def _leave_open_clip(block: CustomResidualAttentionBlock, x: Tensor, read: Tensor) -> Tensor:
    x = x + block.ls_1(block.ln_attn(read))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _project_timm(attn: nn.Module, tokens: Tensor, rope: Tensor | None = None,
                  shared_rel_pos: Tensor | None = None) -> Projected:
    """All of timm's attentions: fused or separate projections, EVA's biases, rotary or relative positions."""
    if attn.qkv is None:
        stacked = attn.q_proj(tokens), attn.k_proj(tokens), attn.v_proj(tokens)
    else:
        x = attn.qkv(tokens)
        if getattr(attn, "q_bias", None) is not None:  # EVA keeps them beside the projection; keys have none
            x = x + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        stacked = x.chunk(3, dim=-1)
    q, k, v = (per_head(x, attn.num_heads) for x in stacked)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = _rotate(attn, q, rope).to(v), _rotate(attn, k, rope).to(v)
    own = getattr(attn, "rel_pos", None)
    return q, k, v, shared_rel_pos if own is None else own.get_bias()


def _rotate(attn: nn.Module, x: Tensor, rope: Tensor) -> Tensor:
    """Turn queries or keys by their place in the image; tokens that are no patches have none."""
    prefix, patches = x.tensor_split([attn.num_prefix_tokens], dim=2)
    options = {"half": True} if getattr(attn, "rotate_half", False) else {}
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, **options)], dim=2)


def _merge_timm(attn: nn.Module, context: Tensor, tokens: Tensor) -> Tensor:
    context = merge_heads(context)
    norm = getattr(attn, "norm", None)
    return attn.proj_drop(attn.proj(context if norm is None else norm(context)))


def _leave_timm(block: Block | RelPosBlock, x: Tensor, read: Tensor) -> Tensor:
    x = x + block.drop_path1(block.ls1(read))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _leave_eva(block: EvaBlock, x: Tensor, read: Tensor) -> Tensor:
    x = x + block.drop_path1(read if block.gamma_1 is None else block.gamma_1 * read)
    update = block.mlp(block.norm2(x))
    return x + block.drop_path2(update if block.gamma_2 is None else block.gamma_2 * update)


def _leave_eva_post_norm(block: EvaBlockPostNorm, x: Tensor, read: Tensor) -> Tensor:
    x = x + block.drop_path1(block.norm1(read))
    return x + block.drop_path2(block.norm2(block.mlp(x)))


ATTENTIONS = {Attention, TimmAttention, EvaAttention, AttentionRope, RelPosAttention}
KINDS = {
    CustomResidualAttentionBlock: BlockKind(lambda block, x: block.ln_1(x), _project_open_clip, _merge_open_clip,
                                            _leave_open_clip),
    Block: BlockKind(lambda block, x: block.norm1(x), _project_timm, _merge_timm, _leave_timm),
    RelPosBlock: BlockKind(lambda block, x: block.norm1(x), _project_timm, _merge_timm, _leave_timm),
    EvaBlock: BlockKind(lambda block, x: block.norm1(x), _project_timm, _merge_timm, _leave_eva),
    EvaBlockPostNorm: BlockKind(lambda block, x: x, _project_timm, _merge_timm, _leave_eva_post_norm),
}
