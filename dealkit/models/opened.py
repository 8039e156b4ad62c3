"""An attention, taken apart for the query that pools: what the cuts of all families but CLIP's own are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from dealkit.models.split import Cut, Split, key_closeness


@dataclass(frozen=True)
class OpenAttention:
    """The attention of some queries over all tokens, and what follows it.

    Attributes:
        q: `[B, heads, Q, d]`, the queries; B is 1 where they are learned.
        k, v: `[B, heads, T, d]`, the keys and values of the tokens.
        finish: what the queries have read, `[B, heads, Q, d]` -> the embedding `[B, D]`, or the tokens after the block.
        bias: added to the logits, `[1, heads, Q, T]`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    finish: Callable[[Tensor], Tensor]
    bias: Tensor | None = None

    @property
    def attention(self) -> Tensor:
        """`[B, heads, Q, T]`, with an explicit softmax: fused attention has no second derivative on a CPU."""
        logits = self.q @ self.k.mT / self.q.shape[-1] ** 0.5
        return (logits if self.bias is None else logits + self.bias).softmax(dim=-1)

    def read(self, attention: Tensor) -> Tensor:
        """Finish with another attention, `[B, heads, Q, T]`, in the place of its own."""
        return self.finish(attention @ self.v)


def row_split(opened: OpenAttention, prefix: int) -> Split:
    """The cut at the row of a single query."""
    v, finish = opened.v, opened.finish  # all that the head needs: the keys may go
    return Split(opened.attention[:, :, 0], lambda row: finish(row[:, :, None] @ v), "attention", prefix=prefix)


def context_split(opened: OpenAttention, prefix: int) -> Split:
    """The cut at what a single query has read."""
    context = (opened.attention @ opened.v)[:, :, 0]
    return Split(context, lambda context: opened.finish(context[:, :, None]), "context", prefix=prefix,
                 values=opened.v, closeness=key_closeness(opened.q, opened.k))


def exits_split(exits: list[Split]) -> Split:
    """One cut out of the rows of all blocks."""
    return Split(exits[-1].variable, exits[-1].head, "exits", prefix=exits[-1].prefix, exits=tuple(exits))


def on(take_apart: Callable[[nn.Module], object], cut: Callable[[object, Tensor, int], Split]) -> Cut:
    """A cut of towers, from one of towers taken apart."""
    return lambda visual, images, block: cut(take_apart(visual), images, block)
