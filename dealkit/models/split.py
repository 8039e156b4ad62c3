"""One image tower, cut in two: embedding = head(variable(trunk(images))).

Explanations ask how the score of an image and a text depends on one intermediate quantity, the explained variable.
Only the head that follows it ever meets the text. The trunk therefore runs once, whatever the number of texts, and a
gradient with respect to the variable costs one pass through a head that is a few layers deep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

SUPPORTED = ("CLS-pooled ViT (ViT-B-32-quickgelu, ViT-L-14, ...), average- and attention-pooled ViT (CLIPA, CoCa), "
             "ModifiedResNet (RN50, ...), FLAVA, and timm's ViT, EVA, ConvNeXt, FastViT and Swin (SigLIP, PE, EVA02, "
             "MobileCLIP, ViTamin, ...)")


@dataclass(frozen=True)
class Split:
    """An image tower, cut for one batch of images.

    Attributes:
        variable: what is explained. Kind "attention": `[B, heads, prefix + h*w]`, the row of the attention matrix that
            belongs to the pooling query, which is CLS or a learned one (`[B, heads, prefix + h*w, prefix + h*w]`, all
            queries, when a CLS-pooled ViT is cut before its last block). Kind "features": `[B, C, h, w]`. Kind
            "context": `[B, heads, d]`, what the pooling query has read, before its heads are merged. Kind "exits": as
            for "attention", in the last block.
        head: the rest of the tower; `head(variable)` is the image embedding `[B, D]`, not of unit norm.
        kind: "attention", "features", "context" or "exits".
        shifted: for features only. `shifted(delta)` with `delta` `[B, C]` equals
            `head(variable + delta[..., None, None])`, but pushes the offset through the projections as one token
            instead of h*w. None for the others.
        prefix: for all but features: how many tokens that are no patches stand first in a row. 1 where CLS is attended
            to, 0 where a learned query pools the patches alone.
        values: for context only, `[B, heads, prefix + h*w, d]`: what each token offers to the query.
        closeness: for context only, `[B, prefix + h*w]`, from `key_closeness`.
        exits: for exits only, one Split of kind "attention" a block, first to last, each with `prefix`. Its variable is
            the pooling query's row in that block, and its head leaves the tower right after that block.
        gain: what scores are multiplied with before their gradient goes back through the head, and the gradient divided
            by. 1 unless the head computes in float16, where small numbers vanish.
    """

    variable: Tensor
    head: Callable[[Tensor], Tensor]
    kind: str
    shifted: Callable[[Tensor], Tensor] | None = None
    prefix: int = 1
    values: Tensor | None = None
    closeness: Tensor | None = None
    exits: tuple[Split, ...] = ()
    gain: float = 1.0


Cut = Callable[[nn.Module, Tensor, int], Split]  # (visual, images, block)


@dataclass(frozen=True)
class Family:
    """What the file of a family of towers tells `find_tower` about one of them.

    Attributes:
        name: the family, in words.
        grid: (h, w) of the maps.
        cuts: kind of variable -> function `cut(visual, images, block)`; the first kind is explained by default.
    """

    name: str
    grid: tuple[int, int]
    cuts: dict[str, Cut]


def unsupported(what: str) -> NotImplementedError:
    """The error for a tower that cannot be cut; `what` names it."""
    return NotImplementedError(f"this image tower is {what}, which has no cut for explanations yet. Supported: "
                               f"{SUPPORTED}. vlm.encode_image and vlm.encode_text do not need a cut.")


def only_last(block: int, family: str, where: str) -> None:
    """Raise unless the cut was asked for at the end of the tower."""
    if block != -1:
        raise ValueError(f"block {block} was asked for, but this {family} is cut at {where} only: block=-1.")


def block_index(block: int, count: int) -> int:
    """A block of `count`, counted from 0; ValueError where there is none."""
    if not -count <= block < count:
        raise ValueError(f"block {block} does not exist: the tower has {count} blocks, 0 to {count - 1}; -1 is the "
                         "last.")
    return block % count


def check_complete(tokens: Tensor, count: int) -> Tensor:
    """Return tokens `[B, count, width]`; ValueError where patch dropout has taken some away."""
    if tokens.shape[1] != count:
        raise ValueError("patch dropout removes patches in training mode, so that a map would have holes. "
                         "Call vlm.model.eval(), or build the model with patch dropout 0.")
    return tokens


def feature_split(features: Tensor, head: Callable[[Tensor], Tensor]) -> Split:
    """A cut at a feature map whose head has no cheaper way to move a channel than moving all its pixels."""
    return Split(features, head, "features", lambda delta: head(features + delta[..., None, None]))


def per_head(x: Tensor, heads: int) -> Tensor:
    """What each attention head sees: `[B, T, width]` -> `[B, heads, T, width / heads]`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """The reverse of `per_head`: `[B, heads, T, d]` -> `[B, T, heads * d]`."""
    return x.transpose(1, 2).flatten(2)


def key_closeness(q: Tensor, k: Tensor) -> Tensor:
    """The cosine of the pooling query `[B, heads, 1, d]` and each key `[B, heads, T, d]`, heads as one: `[B, T]`."""
    return F.cosine_similarity(merge_heads(q), merge_heads(k), dim=-1)
