"""Where a CLS-pooled vision transformer is cut.

The trunk is made of open_clip's own modules, called as they are. The head is written out with an explicit softmax:
fused attention has no second derivative on a CPU, and training on maps needs one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dealkit.models.split import Split, per_head


def cut_vit_attention(visual: VisionTransformer, images: Tensor, block: int = -1) -> Split:
    """Cut a CLS-pooled ViT at the attention of a block.

    In the last block only the CLS query matters, because nothing after it reads the patch tokens: its head is one token
    through one MLP. Before that every query matters, so the variable is the whole attention matrix.
    """
    blocks = visual.transformer.resblocks
    index, last = _block_index(blocks, block)
    x = _vit_tokens(visual, images, index)
    tokens = blocks[index].ln_1(x)
    queries = slice(0, 1) if last else slice(None)
    q, k, v = _queries_keys_values(blocks[index].attn, tokens[:, queries], tokens)
    attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)  # [B, heads, queries, 1 + h*w]

    def head(attention: Tensor) -> Tensor:
        rows = attention[:, :, None] if last else attention
        return _vit_rest(visual, index, x[:, queries], rows @ v)

    return Split(attention[:, :, 0] if last else attention, head, "attention")


def cut_vit_features(visual: VisionTransformer, images: Tensor, block: int = -1) -> Split:
    """Cut a CLS-pooled ViT at the patch tokens that enter the last block's attention (after its first LayerNorm).

    That is where Grad-CAM is customarily read on a ViT: the tokens after the last block no longer reach the embedding.
    """
    blocks = visual.transformer.resblocks
    index, last = _block_index(blocks, block)
    if not last:
        raise ValueError(f"block {block} is not the last one; a ViT's features are cut at its last block, block=-1.")
    x = _vit_tokens(visual, images, index)
    attn, tokens = blocks[index].attn, blocks[index].ln_1(x)
    cls, patches = tokens[:, :1], tokens[:, 1:]

    def read(q: Tensor, k: Tensor, v: Tensor, key_offset: Tensor | float = 0.0,
             value_offset: Tensor | float = 0.0) -> Tensor:
        logits = q @ k.mT / q.shape[-1] ** 0.5
        logits = torch.cat([logits[..., :1], logits[..., 1:] + key_offset], dim=-1)
        attention = logits.softmax(dim=-1)
        context = attention @ v + attention[..., 1:].sum(dim=-1, keepdim=True) * value_offset
        return _vit_rest(visual, index, x[:, :1], context)

    def head(features: Tensor) -> Tensor:
        return read(*_queries_keys_values(attn, cls, torch.cat([cls, features.flatten(2).mT], dim=1)))

    q, k, v = _queries_keys_values(attn, cls, tokens)

    def shifted(delta: Tensor) -> Tensor:
        # The projections are linear: one offset on all patches moves every patch's key, and its value, equally.
        offsets = F.linear(delta[:, None], attn.in_proj_weight[attn.embed_dim:])
        key_offset, value_offset = (per_head(o, attn.num_heads) for o in offsets.chunk(2, dim=-1))
        return read(q, k, v, q @ key_offset.mT / q.shape[-1] ** 0.5, value_offset)

    return Split(patches.mT.unflatten(2, tuple(visual.grid_size)), head, "features", shifted)


def _vit_tokens(visual: VisionTransformer, images: Tensor, depth: int) -> Tensor:
    """The trunk: `[B, 3, H, W]` -> tokens `[B, 1 + h*w, width]` before block number `depth`, CLS first."""
    x = visual.conv1(images).flatten(2).mT
    cls = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
    x = torch.cat([cls, x], dim=1) + visual.positional_embedding.to(x.dtype)
    tokens = x.shape[1]
    x = visual.ln_pre(visual.patch_dropout(x))
    if x.shape[1] != tokens:
        raise ValueError("patch dropout removes patches in training mode, so that a map would have holes. "
                         "Call vlm.model.eval(), or build the model with patch dropout 0.")
    save_memory = visual.transformer.grad_checkpointing and torch.is_grad_enabled()
    for number in range(depth):
        layer = visual.transformer.resblocks[number]
        x = checkpoint(layer, x, use_reentrant=False) if save_memory else layer(x)
    return x


def _vit_rest(visual: VisionTransformer, index: int, x: Tensor, context: Tensor) -> Tensor:
    """From what the heads of block `index` read, `[B, heads, queries, d]`, to the embedding `[B, D]`; x: residuals."""
    blocks = visual.transformer.resblocks
    block = blocks[index]
    x = x + block.ls_1(block.attn.out_proj(context.transpose(1, 2).flatten(2)))
    x = x + block.ls_2(block.mlp(block.ln_2(x)))
    with sdpa_kernel(SDPBackend.MATH):  # later blocks, if any, must be differentiable twice
        for number in range(index + 1, len(blocks)):
            x = blocks[number](x)
    pooled = visual.ln_post(x[:, 0])  # LayerNorm acts on each token alone, so it may follow the pooling
    return pooled if visual.proj is None else pooled @ visual.proj


def _queries_keys_values(attn: nn.MultiheadAttention, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three projections of an attention layer, each `[B, heads, T, d]`; its weights are stacked as q, k, v."""
    weight_q, weight_kv = attn.in_proj_weight.split([attn.embed_dim, 2 * attn.embed_dim])
    bias_q, bias_kv = attn.in_proj_bias.split([attn.embed_dim, 2 * attn.embed_dim])
    keys, values = F.linear(tokens, weight_kv, bias_kv).chunk(2, dim=-1)
    return tuple(per_head(x, attn.num_heads) for x in (F.linear(queries, weight_q, bias_q), keys, values))


def _block_index(blocks: nn.ModuleList, block: int) -> tuple[int, bool]:
    """The block counted from 0, and whether it is the last."""
    if not -len(blocks) <= block < len(blocks):
        raise ValueError(f"block {block} does not exist: the tower has {len(blocks)} blocks, 0 to {len(blocks) - 1}; "
                         "-1 is the last.")
    index = block % len(blocks)
    return index, index == len(blocks) - 1
