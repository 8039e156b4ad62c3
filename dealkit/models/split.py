"""One image tower, cut in two: embedding = head(variable(trunk(images))).

Explanations ask how the score of an image and a text depends on one intermediate quantity, the explained variable.
Only the head that follows it ever meets the text. The trunk therefore runs once, whatever the number of texts, and a
gradient with respect to the variable costs one pass through a head that is a few layers deep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Split:
    """An image tower, cut for one batch of images.

    Attributes:
        variable: what is explained. Kind "attention": `[B, heads, 1 + h*w]`, the CLS query's row of the attention
            matrix (`[B, heads, 1 + h*w, 1 + h*w]`, all queries, when the cut is before the last block). Kind
            "features": `[B, C, h, w]`.
        head: the rest of the tower; `head(variable)` is the image embedding `[B, D]`, not of unit norm.
        kind: "attention" or "features".
        shifted: for features only. `shifted(delta)` with `delta` `[B, C]` equals
            `head(variable + delta[..., None, None])`, but pushes the offset through the projections as one token
            instead of h*w. None for attention.
    """

    variable: Tensor
    head: Callable[[Tensor], Tensor]
    kind: str
    shifted: Callable[[Tensor], Tensor] | None = None


def per_head(x: Tensor, heads: int) -> Tensor:
    """What each attention head sees: `[B, T, width]` -> `[B, heads, T, width / heads]`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
