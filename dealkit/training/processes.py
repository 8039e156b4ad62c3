"""One process or many: which images are whose, and what the processes tell each other.

The launcher (accelerate launch, torchrun, notebook_launcher) starts one process a device, with the same call of
`finetune` in each. A batch of n images is split evenly: every process takes ceil(n / W) of them, and where that does
not come out even the last ones repeat an image whose weight is 0. Nothing is left out.

`accelerate.PartialState` is what finds the processes and their devices. A full `Accelerator` would fix the precision
for as long as Python runs, and a notebook fine-tunes in float32 and in bfloat16 one after the other. A run of a single
process does not even set that up: what a notebook launches later would inherit it, and every process train alone.
"""
from __future__ import annotations

import math
import multiprocessing
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")   # torch's and those of MPI
LAUNCHED_IN = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Share:
    """The part of a batch that one of several processes takes: `total` images in all, this is process `rank`."""

    rank: int
    processes: int
    total: int

    @property
    def size(self) -> int:
        """Images that every process works on, repeats included."""
        return math.ceil(self.total / self.processes)

    @property
    def real(self) -> int:
        """How many of them are no repeats; they come first. The last process may have none."""
        return max(0, min(self.size, self.total - self.rank * self.size))

    def of(self, items: list) -> list:
        """This process's part of a list that has an entry for each of the `total` images."""
        start = self.rank * self.size
        return [*items[start:start + self.real], *items[:1] * (self.size - self.real)]


class Processes:
    """All processes of a run, seen from one of them. With a single one everything here does nothing.

    Raises:
        ValueError: launched with FSDP or DeepSpeed, which this loop does not know.
    """

    def __init__(self, vlm, precision: str):
        self.rank, self.count = 0, 1
        if type(multiprocessing.current_process()).__name__ == "ForkProcess":
            # a copy of a process whose threads have worked (notebook_launcher's, where the notebook has computed
            # something) has only one of them, and would wait for the others for ever
            torch.set_num_threads(1)
        if dist.is_initialized() or max(int(os.environ.get(name, "1")) for name in WORLD_SIZES) > 1:
            for name in ("FSDP", "DEEPSPEED"):
                if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
                    raise ValueError(f"finetune was launched with {name}; it splits the batch, not the model. Launch "
                                     "it with accelerate launch --multi_gpu, without a configuration for that.")
            # not by where the model is alone: a notebook that launches processes must leave its own off the GPUs
            state = PartialState(cpu=_asked_for_cpu() or vlm.device.type == "cpu" and not torch.cuda.is_available())
            self.rank, self.count = state.process_index, state.num_processes
            if self.count == 1 and not dist.is_initialized():
                raise RuntimeError("accelerate was set up for one process before the others were launched, and each "
                                   "would train alone. Restart the kernel; create no Accelerator before the launch.")
            vlm.to(state.device)                                 # the one that the launcher chose for this process
        launched_in = LAUNCHED_IN.get(os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), "another precision")
        if launched_in not in ("float32", precision):
            warnings.warn(f"accelerate was launched for {launched_in}, and the config says {precision}: the config is "
                          "followed.", stacklevel=3)

    @property
    def is_main(self) -> bool:
        """Whether this one shows the bar and writes the files."""
        return self.rank == 0

    def share(self, total: int) -> Share | None:
        """This process's part of a batch; None where there is nobody to share it with."""
        return Share(self.rank, self.count, total) if self.count > 1 else None

    def wrap(self, objective: nn.Module) -> nn.Module:
        """The objective, with gradients that are averaged over all processes; the weights become those of the main one.

        Parts of a model that no term uses (CoCa's decoder) keep no gradient, as in a single process.
        """
        if self.count == 1:
            return objective
        for buffer in objective.buffers():                       # statistics of a BatchNorm: once, for they stay
            dist.broadcast(buffer, src=0)
        known = signature(DistributedDataParallel).parameters    # newer versions of torch have another name for it
        once = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
        return DistributedDataParallel(objective, find_unused_parameters=True, **once)

    def from_main(self, function: Callable[[], object]) -> object:
        """What `function` gives in the main process, which alone runs it; what it raises, all raise."""
        if self.count == 1:
            return function()
        answer = [None, None]
        if self.is_main:
            try:
                answer[0] = function()
            except Exception as error:
                answer[1] = error
        broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.count > 1:
            dist.all_reduce(values)
            values = values / self.count
        return values

    def all_labels(self, labels: Tensor, share: Share | None, device: torch.device) -> Tensor:
        """The labels of the whole batch."""
        return labels if share is None else gather(labels.to(device))[:share.total].cpu()

    def spread(self, optimizer: torch.optim.Optimizer) -> None:
        """Give every process the moments of the main one, which has read them from a file."""
        if self.count == 1:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        steps = self.from_main(lambda: {i: float(optimizer.state[p]["step"]) for i, p in enumerate(parameters)
                                        if p in optimizer.state})
        for i, step in steps.items():
            parameter, fused = parameters[i], optimizer.defaults["fused"]
            if not self.is_main:
                optimizer.state[parameter] = {
                    "step": torch.tensor(step, device=parameter.device if fused else "cpu"),
                    "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            for name in ("exp_avg", "exp_avg_sq"):
                dist.broadcast(optimizer.state[parameter][name], src=0)


def _asked_for_cpu() -> bool:
    """Whether the launcher was told to leave the GPUs alone: accelerate launch --cpu."""
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "on")


def gather(rows: Tensor) -> Tensor:
    """Rows of all processes, `[n, ...]` each -> `[W n, ...]`, in their order; with the gradient.

    A loss of the gathered rows is the same number in every process, and its gradient goes back to the process that each
    row came from, summed over all processes. `DistributedDataParallel` then takes the mean: that of one process.
    """
    return _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()                 # autograd's own must not be written to
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
