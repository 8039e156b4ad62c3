"""Half precision where it is fast, float32 where it matters.

The towers, which are nearly all of the work, run under autocast: their weights stay float32. What lies outside, from
the cosine of image and text to maps and losses, is float32. So a map is a difference of small numbers in full
precision, and only what went through the layers of a head carries the rounding of these layers.
"""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from dealkit.models import Split

# A gradient that starts at a cosine is of the order 1e-3 and falls on its way back; float16 resolves nothing below 6e-8
# and is coarse below 6e-5. Far from its upper end, 65504, too.
FLOAT16_GAIN = 2.0 ** 10


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Compute in `precision` inside; nothing at all for "float32".

    Raises:
        ValueError: a device that has no autocast.
    """
    if precision == "float32":
        return nullcontext()
    if not torch.amp.is_autocast_available(device.type):
        raise ValueError(f"precision {precision!r} is not to be had on {device.type!r}; take precision='float32'.")
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def in_float32(split: Split, precision: str) -> Split:
    """A split that was cut under autocast, seen from outside: float32 tensors, and heads that take and give float32.

    The heads themselves compute in `precision`. Anything for "float32" comes back as it is.
    """
    if precision == "float32":
        return split

    def wrap(head: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor] | None:
        if head is None:
            return None

        def wrapped(variable: Tensor) -> Tensor:
            with autocast(variable.device, precision):
                return head(variable).float()
        return wrapped

    return replace(split, variable=split.variable.float(), head=wrap(split.head), shifted=wrap(split.shifted),
                   values=None if split.values is None else split.values.float(),
                   closeness=None if split.closeness is None else split.closeness.float(),
                   exits=tuple(in_float32(stop, precision) for stop in split.exits),
                   gain=FLOAT16_GAIN if precision == "float16" else split.gain)


def check_weights(vlm, precision: str) -> None:
    """Raise ValueError where the weights of a model are not those that `precision` can train."""
    if vlm.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"the weights are {vlm.dtype}, in which an update of the size of lr vanishes. Load them with "
                         "dtype='float32', and set DealConfig(precision='bfloat16') to compute in half precision.")
    if precision == "float16" and vlm.device.type not in ("cpu", "cuda"):
        raise ValueError(f"precision 'float16' is not to be had on {vlm.device.type!r}; take 'bfloat16' or 'float32'.")
    if precision != "float32" and vlm.dtype != torch.float32:
        raise ValueError(f"precision {precision!r} works on float32 weights; these are {vlm.dtype}. Load them with "
                         "dtype='float32', or set precision='float32', which computes in the precision of the weights.")
