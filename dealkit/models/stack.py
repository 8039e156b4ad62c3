"""Where a CLS-pooled stack of transformer blocks of any kind is cut: open_clip's custom blocks, timm's ViTs, FLAVA.

`vit.py` does the same for CLIP's own blocks, with projections of its own that spare what the CLS query does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dealkit.models.blocks import BlockKind
from dealkit.models.opened import OpenAttention, context_split, exits_split, on, row_split
from dealkit.models.split import Cut, Split, block_index, check_complete, feature_split, only_last

Extras = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Stack:
    """A CLS-pooled transformer, taken apart.

    Attributes:
        blocks: the stock blocks, first to last.
        kind: their steps.
        embed: images -> tokens `[B, prefix + h*w, width]` before the first block, and for each block the keyword
            arguments that it is called with.
        pool: tokens after the last block, CLS first -> embedding `[B, D]`.
        grid: (h, w).
        prefix: tokens that are no patches; they stand first.
        grad_checkpointing: whether the trunk recomputes its blocks in the backward pass.
    """

    blocks: Sequence[nn.Module]
    kind: BlockKind
    embed: Callable[[Tensor], tuple[Tensor, Extras]]
    pool: Callable[[Tensor], Tensor]
    grid: tuple[int, int]
    prefix: int = 1
    grad_checkpointing: bool = False


def stack_cuts(take_apart: Callable[[nn.Module], Stack]) -> dict[str, Cut]:
    """All cuts of the towers that `take_apart` makes a Stack of."""
    return {"attention": on(take_apart, cut_stack_attention), "features": on(take_apart, cut_stack_features),
            "context": on(take_apart, cut_stack_context), "exits": on(take_apart, cut_stack_exits)}


def cut_stack_attention(stack: Stack, images: Tensor, block: int = -1) -> Split:
    """Cut at the attention of a block: the CLS query's row in the last one, all queries before that."""
    index = block_index(block, len(stack.blocks))
    x, extras = _run_trunk(stack, images, index)
    if index == len(stack.blocks) - 1:
        return row_split(_open_cls(stack, index, x, extras[index]), stack.prefix)
    opened = _open(stack, index, x, _enter(stack, index, x), extras[index])

    def head(attention: Tensor) -> Tensor:
        x = opened.read(attention)
        with sdpa_kernel(SDPBackend.MATH):  # the blocks that follow must be differentiable twice
            for number in range(index + 1, len(stack.blocks)):
                x = stack.kind.run(stack.blocks[number], x, **extras[number])
        return stack.pool(x)

    return Split(opened.attention, head, "attention", prefix=stack.prefix)


def cut_stack_features(stack: Stack, images: Tensor, block: int = -1) -> Split:
    """Cut at the patch tokens that enter the last block's attention, as `vit.cut_vit_features` does."""
    only_last(block, "ViT", "the tokens of its last block")
    last = len(stack.blocks) - 1
    x, extras = _run_trunk(stack, images, last)
    prefix, patches = _enter(stack, last, x).tensor_split([stack.prefix], dim=1)

    def head(features: Tensor) -> Tensor:
        tokens = torch.cat([prefix, features.flatten(2).mT], dim=1)
        opened = _open_cls(stack, last, x, extras[last], tokens)
        return opened.read(opened.attention)

    return feature_split(patches.mT.unflatten(2, stack.grid), head)


def cut_stack_context(stack: Stack, images: Tensor, block: int = -1) -> Split:
    """Cut at what the CLS query reads in the last block."""
    only_last(block, "ViT", "what CLS reads in its last block")
    last = len(stack.blocks) - 1
    x, extras = _run_trunk(stack, images, last)
    return context_split(_open_cls(stack, last, x, extras[last]), stack.prefix)


def cut_stack_exits(stack: Stack, images: Tensor, block: int = -1) -> Split:
    """Cut at the CLS row of every block's attention, each with an exit from the tower right after its block."""
    only_last(block, "ViT", "all its blocks at once")
    x, extras = _embed(stack, images)
    save_memory = stack.grad_checkpointing and torch.is_grad_enabled()
    exits = []
    for number in range(len(stack.blocks)):
        exits.append(row_split(_open_cls(stack, number, x, extras[number]), stack.prefix))
        if number < len(stack.blocks) - 1:
            x = _run(stack, number, x, extras[number], save_memory)
    return exits_split(exits)


def _open(stack: Stack, index: int, x: Tensor, tokens: Tensor, extras: dict[str, Tensor],
          rows: slice = slice(None)) -> OpenAttention:
    """The attention of a block for some of its queries; it finishes with the tokens after the block.

    Args:
        x: `[B, T, width]`, the residual stream before the block.
        tokens: `[B, T, width]`, what its attention reads.
    """
    kind, block = stack.kind, stack.blocks[index]
    attn = kind.attention(block)
    q, k, v, bias = kind.project(attn, tokens, **extras)
    if rows != slice(None):  # no views, which would keep all tokens of every block in memory
        x, tokens, v = x[:, rows].clone(), tokens[:, rows].clone(), v.contiguous()
    return OpenAttention(q[:, :, rows], k, v, lambda context: kind.leave(block, x, kind.merge(attn, context, tokens)),
                         None if bias is None else bias[:, :, rows])


def _open_cls(stack: Stack, index: int, x: Tensor, extras: dict[str, Tensor],
              tokens: Tensor | None = None) -> OpenAttention:
    """The attention of the CLS query alone, with an exit from the tower right after the block."""
    tokens = _enter(stack, index, x) if tokens is None else tokens
    opened = _open(stack, index, x, tokens, extras, slice(0, 1))
    return OpenAttention(opened.q, opened.k, opened.v, lambda context: stack.pool(opened.finish(context)), opened.bias)


def _embed(stack: Stack, images: Tensor) -> tuple[Tensor, Extras]:
    x, extras = stack.embed(images)
    return check_complete(x, stack.prefix + stack.grid[0] * stack.grid[1]), extras


def _enter(stack: Stack, index: int, x: Tensor) -> Tensor:
    return stack.kind.enter(stack.blocks[index], x)


def _run_trunk(stack: Stack, images: Tensor, depth: int) -> tuple[Tensor, Extras]:
    """Tokens before block number `depth`, and the keyword arguments of all blocks."""
    x, extras = _embed(stack, images)
    save_memory = stack.grad_checkpointing and torch.is_grad_enabled()
    for number in range(depth):
        x = _run(stack, number, x, extras[number], save_memory)
    return x, extras


def _run(stack: Stack, index: int, x: Tensor, extras: dict[str, Tensor], save_memory: bool) -> Tensor:
    """A stock block, as it is."""
    run, block = stack.kind.run, stack.blocks[index]
    return checkpoint(run, block, x, use_reentrant=False, **extras) if save_memory else run(block, x, **extras)
