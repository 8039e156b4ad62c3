"""One step: the terms, their gradient, and the weights; or a plain word about why there was none."""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from dealkit.training.config import DealConfig
from dealkit.training.objective import TERMS, DealObjective
from dealkit.training.processes import Processes


class OutOfMemory(RuntimeError, MemoryError):
    """A step did not fit into the memory; the message says what to try."""


@dataclass
class Trainer:
    """What a step works with.

    Attributes:
        objective: the terms; `wrapped` is the same with its gradients averaged over the processes.
        optimizer: of the weights that are trained.
        scaler: lifts the loss off the bottom of float16; switched off for any other precision.
        processes: who shares the batch.
    """

    objective: DealObjective
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    processes: Processes

    @property
    def config(self) -> DealConfig:
        return self.objective.config

    @property
    def columns(self) -> tuple[str, ...]:
        """The numbers of a step."""
        return (*TERMS, *self.objective.multipliers.columns, *(["skipped"] if self.scaler.is_enabled() else []))

    def share_state(self) -> None:
        """Start all processes from the weights, the moments and the scale of the first."""
        self.wrapped = self.processes.wrap(self.objective)
        self.processes.spread(self.optimizer)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(self.processes.from_main(self.scaler.state_dict))


def make_trainer(objective: DealObjective, processes: Processes) -> Trainer:
    """Optimizer and scaler for the weights that require a gradient."""
    config, device = objective.config, objective.vlm.device
    trained = [p for p in objective.vlm.model.parameters() if p.requires_grad]
    # one pass over each weight: a tenth of the time of the plain loop on a CPU, and the same bits on every run
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam(trained, lr=config.lr, betas=config.betas, eps=config.eps,
                                 weight_decay=config.weight_decay, foreach=False, fused=fused)
    scaler = torch.amp.GradScaler("cuda" if device.type == "cuda" else "cpu", enabled=config.precision == "float16")
    return Trainer(objective, objective, optimizer, scaler, processes)


def take_step(trainer: Trainer, step: int, *inputs) -> dict[str, float]:
    """Take one step -> its numbers, named as in `trainer.columns`; the same in every process.

    Args:
        step: its number, for the messages.
        inputs: of the objective.

    Raises:
        FloatingPointError: a term or a gradient is NaN or infinite. A gradient that overflows in float16 is no error
            but a step without an update, "skipped"; it is one once it no longer fits at any scale.
        OutOfMemory: names the step, the batch size, and what to try.
    """
    trouble, moving = None, False
    try:
        values = _gradients(trainer, step, *inputs)
        moving = True
        trainer.scaler.step(trainer.optimizer)
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
        trouble = str(error).split("\n")[0][:300]
    if trouble:                                                  # out of `except`, whose traceback keeps the tensors
        trainer.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemory(_what_to_try(trainer.config, step, moving, trouble))
    trainer.scaler.update()
    with torch.no_grad():
        trainer.objective.vlm.model.logit_scale.clamp_(max=math.log(100))      # CLIP's own bound
    return values


def _gradients(trainer: Trainer, step: int, *inputs) -> dict[str, float]:
    trainer.optimizer.zero_grad()                                # first: a forward pass needs the memory
    terms = trainer.wrapped(*inputs)
    trainer.scaler.scale(terms["total"]).backward()
    if trainer.scaler.is_enabled():
        trainer.scaler.unscale_(trainer.optimizer)
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"] if p.grad is not None]
    # a sum is finite only where every number in it is; the largest one would take eight times as long
    finite = torch.stack([p.grad.sum() for p in parameters]).isfinite().all()
    # one question to the device a step, and one answer
    numbers = torch.stack([terms[name].detach() for name in TERMS] + [finite]).to(terms["total"].dtype)
    *numbers, finite = trainer.processes.mean(numbers).tolist()
    values = dict(zip(TERMS, numbers))
    broken = [f"the term {name!r} is {values[name]}" for name in TERMS if not math.isfinite(values[name])]
    if trainer.scaler.is_enabled():
        values["skipped"] = float(finite < 1)
        if finite < 1 and not broken and trainer.scaler.get_scale() > 1:
            return values
    if not broken and finite < 1:
        named = trainer.objective.vlm.model.named_parameters()
        broken = [f"the gradient of {name!r} is not finite" for name, p in named
                  if p.grad is not None and not p.grad.isfinite().all()] or ["a gradient is not finite"]
    if broken:
        precision = ("float32 weights" if trainer.config.precision == "float32" else
                     f"precision='{'bfloat16' if trainer.config.precision == 'float16' else 'float32'}'")
        raise FloatingPointError(
            f"step {step}: {broken[0]}. Nothing was skipped: the weights are those before this step. Try a smaller lr "
            f"(now {trainer.config.lr:g}), {precision} (now {trainer.objective.vlm.dtype}), or look at the images of "
            "this step.")
    return values


def _what_to_try(config: DealConfig, step: int, moving: bool, trouble: str) -> str:
    state = ("some weights may have been updated by this step: load the last checkpoint" if moving
             else "the weights are those before this step")
    ways = [] if config.batch_size < 4 else [f"batch_size={max(2, _smaller(config.batch_size))}"]
    ways += [] if config.checkpoint_activations else ["checkpoint_activations=True"]
    ways += ["precision='bfloat16'"] if config.precision == "float32" else []
    ways += [] if config.freeze_text else ["freeze_text=True"]
    return (f"step {step} with batch_size={config.batch_size} did not fit into the memory ({trouble}); {state}. "
            f"Try DealConfig({', or '.join(ways) or '... a smaller model'}), or more devices.")


def _smaller(batch_size: int) -> int:
    """The largest power of two that is at most three quarters of a batch."""
    return 2 ** int(math.log2(batch_size * 3 / 4))
