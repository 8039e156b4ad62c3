"""Where a CLS-pooled vision transformer is cut.

The trunk is made of open_clip's own modules, called as they are; only where every block has an exit, its attention is
taken apart. The head is written out with an explicit softmax: fused attention has no second derivative on a CPU, and
training on maps needs one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dealkit.models.opened import OpenAttention, context_split, exits_split, row_split
from dealkit.models.split import Split, block_index, check_complete, merge_heads, per_head

CLS = slice(0, 1)  # the query that becomes the embedding


def cut_vit_attention(visual: VisionTransformer, images: Tensor, block: int = -1) -> Split:
    """Cut a CLS-pooled ViT at the attention of a block.

    In the last block only the CLS query matters, because nothing after it reads the patch tokens: its head is one token
    through one MLP. Before that every query matters, so the variable is the whole attention matrix.
    """
    blocks = visual.transformer.resblocks
    index = block_index(block, len(blocks))
    x = vit_tokens(visual, images, index)
    if index == len(blocks) - 1:
        return row_split(_open(visual, index, x, blocks[index].ln_1(x), CLS), prefix=1)
    opened = _open(visual, index, x, blocks[index].ln_1(x), slice(None))
    return Split(opened.attention, opened.read, "attention")


def cut_vit_features(visual: VisionTransformer, images: Tensor, block: int = -1) -> Split:
    """Cut a CLS-pooled ViT at the patch tokens that enter the last block's attention (after its first LayerNorm).

    That is where Grad-CAM is customarily read on a ViT: the tokens after the last block no longer reach the embedding.
    """
    index = _last_index(visual, block, "features are")
    x = vit_tokens(visual, images, index)
    layer = visual.transformer.resblocks[index]
    attn, tokens = layer.attn, layer.ln_1(x)
    cls, patches = tokens[:, :1], tokens[:, 1:]
    opened = _open(visual, index, x, tokens, CLS)

    def head(features: Tensor) -> Tensor:
        moved = _open(visual, index, x, torch.cat([cls, features.flatten(2).mT], dim=1), CLS)
        return moved.read(moved.attention)

    def shifted(delta: Tensor) -> Tensor:
        # The projections are linear: one offset on all patches moves every patch's key, and its value, equally.
        offsets = F.linear(delta[:, None], attn.in_proj_weight[attn.embed_dim:])
        key_offset, value_offset = (per_head(o, attn.num_heads) for o in offsets.chunk(2, dim=-1))
        gained = opened.q @ key_offset.mT / opened.q.shape[-1] ** 0.5  # [B, heads, 1, 1], by every patch's logit
        bias = F.pad(gained.expand(-1, -1, -1, patches.shape[1]), (1, 0))
        attention = replace(opened, bias=bias).attention
        return opened.finish(attention @ opened.v + attention[..., 1:].sum(dim=-1, keepdim=True) * value_offset)

    return Split(patches.mT.unflatten(2, tuple(visual.grid_size)), head, "features", shifted)


def cut_vit_context(visual: VisionTransformer, images: Tensor, block: int = -1) -> Split:
    """Cut a CLS-pooled ViT at what the CLS query reads in the last block: the context, before `out_proj`."""
    index = _last_index(visual, block, "what CLS reads is")
    x = vit_tokens(visual, images, index)
    return context_split(_open(visual, index, x, visual.transformer.resblocks[index].ln_1(x), CLS), prefix=1)


def cut_vit_exits(visual: VisionTransformer, images: Tensor, block: int = -1) -> Split:
    """Cut a CLS-pooled ViT at the CLS row of every block's attention, each with an exit from the tower after its block.

    An exit reads CLS alone, so it is one token through one MLP, and all exits come from one pass through the trunk.
    """
    blocks = visual.transformer.resblocks
    _last_index(visual, block, "all exits are")
    x = vit_tokens(visual, images, 0)
    save_memory = visual.transformer.grad_checkpointing and torch.is_grad_enabled()
    exits = []
    for index, layer in enumerate(blocks):
        cls = x[:, :1].clone()  # not a view, which would keep the tokens of every block in memory
        step = layer, x, index == len(blocks) - 1
        x, row, values = checkpoint(_run_with_row, *step, use_reentrant=False) if save_memory else _run_with_row(*step)
        exits.append(_vit_exit(visual, layer, cls, row, values))
    return exits_split(exits)


def _run_with_row(layer: nn.Module, x: Tensor, last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A stock block, taken apart: its output, the CLS row of its attention `[B, heads, T]`, its values.

    Projecting the keys and values of every block a second time, beside the stock call, would cost a sixth of the trunk.
    """
    tokens = layer.ln_1(x)
    q, k, v = _queries_keys_values(layer.attn, tokens[:, :1] if last else tokens, tokens)
    v = v.contiguous()  # not a view, which would keep the keys in memory
    row = (q[:, :, :1] @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)[:, :, 0]
    if not last:  # nothing reads the output of the last block
        x = _after_attention(layer, x, F.scaled_dot_product_attention(q, k, v))
    return x, row, v


def _vit_exit(visual: VisionTransformer, layer: nn.Module, cls: Tensor, row: Tensor, values: Tensor) -> Split:
    """The cut at one block's CLS row, with the head that leaves the tower right after that block."""
    return Split(row, lambda row: _embed_cls(visual, _after_attention(layer, cls, row[:, :, None] @ values)),
                 "attention")


def vit_tokens(visual: VisionTransformer, images: Tensor, depth: int) -> Tensor:
    """The trunk: `[B, 3, H, W]` -> tokens `[B, 1 + h*w, width]` before block number `depth`, CLS first."""
    x = visual.conv1(images).flatten(2).mT
    cls = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
    x = torch.cat([cls, x], dim=1) + visual.positional_embedding.to(x.dtype)
    x = visual.ln_pre(check_complete(visual.patch_dropout(x), x.shape[1]))
    save_memory = visual.transformer.grad_checkpointing and torch.is_grad_enabled()
    for number in range(depth):
        layer = visual.transformer.resblocks[number]
        x = checkpoint(layer, x, use_reentrant=False) if save_memory else layer(x)
    return x


def _open(visual: VisionTransformer, index: int, x: Tensor, tokens: Tensor, rows: slice) -> OpenAttention:
    """The attention of a block for some of its queries, taken apart; it finishes with the embedding.

    Args:
        x: `[B, T, width]`, the residual stream before the block.
        tokens: `[B, T, width]`, what its attention reads.
    """
    q, k, v = _queries_keys_values(visual.transformer.resblocks[index].attn, tokens[:, rows], tokens)
    return OpenAttention(q, k, v, lambda context: _vit_rest(visual, index, x[:, rows], context))


def _vit_rest(visual: VisionTransformer, index: int, x: Tensor, context: Tensor) -> Tensor:
    """From what the heads of block `index` read, `[B, heads, queries, d]`, to the embedding `[B, D]`; x: residuals."""
    blocks = visual.transformer.resblocks
    x = _after_attention(blocks[index], x, context)
    with sdpa_kernel(SDPBackend.MATH):  # later blocks, if any, must be differentiable twice
        for number in range(index + 1, len(blocks)):
            x = blocks[number](x)
    return _embed_cls(visual, x)


def _after_attention(layer: nn.Module, x: Tensor, context: Tensor) -> Tensor:
    """The rest of a block for some of its queries; x: their residuals."""
    x = x + layer.ls_1(layer.attn.out_proj(merge_heads(context)))
    return x + layer.ls_2(layer.mlp(layer.ln_2(x)))


def _embed_cls(visual: VisionTransformer, x: Tensor) -> Tensor:
    """Tokens after a block, CLS first -> the embedding `[B, D]`."""
    pooled = visual.ln_post(x[:, 0])  # LayerNorm acts on each token alone, so it may follow the pooling
    return pooled if visual.proj is None else pooled @ visual.proj


def _queries_keys_values(attn: nn.MultiheadAttention, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three projections of an attention layer, each `[B, heads, T, d]`; its weights are stacked as q, k, v."""
    weight_q, weight_kv = attn.in_proj_weight.split([attn.embed_dim, 2 * attn.embed_dim])
    bias_q, bias_kv = attn.in_proj_bias.split([attn.embed_dim, 2 * attn.embed_dim])
    keys, values = F.linear(tokens, weight_kv, bias_kv).chunk(2, dim=-1)
    return tuple(per_head(x, attn.num_heads) for x in (F.linear(queries, weight_q, bias_q), keys, values))


def _last_index(visual: VisionTransformer, block: int, what: str) -> int:
    """The last block's index; ValueError where another one was asked for, `what` of which cannot be cut there."""
    last = len(visual.transformer.resblocks) - 1
    if block_index(block, last + 1) != last:
        raise ValueError(f"block {block} is not the last one; {what} cut at the end of the tower, block=-1.")
    return last
