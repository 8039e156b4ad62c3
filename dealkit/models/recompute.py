"""Less memory for more time: the blocks of a tower are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from open_clip.modified_resnet import ModifiedResNet
from torch import nn


@contextmanager
def grad_checkpointing(tower: nn.Module) -> Iterator[None]:
    """Inside, open_clip's and timm's own switches for it are on, in all parts of a tower; afterwards as they were.

    A forward pass decides what its backward pass will recompute, so that the switches may be back by then. A
    ModifiedResNet has none: `cut_resnet` recomputes its blocks itself.
    """
    switches = find_switches(tower)
    before = [part.grad_checkpointing for part in switches]
    try:
        for part in switches:
            part.grad_checkpointing = True
        yield
    finally:
        for part, value in zip(switches, before):
            part.grad_checkpointing = value


def find_switches(tower: nn.Module) -> list[nn.Module]:
    """The parts of a tower that can recompute what they compute."""
    return [part for part in tower.modules() if isinstance(getattr(part, "grad_checkpointing", None), bool)]


def check_switches(visual: nn.Module) -> None:
    """Raise ValueError for an image tower that cannot recompute its blocks: FLAVA's."""
    if not find_switches(visual) and not isinstance(visual, ModifiedResNet):
        raise ValueError(f"activations of a {type(visual).__name__} cannot be recomputed: it has no switch for that. "
                         "Leave checkpoint_activations off, and take a smaller batch_size or another precision.")
