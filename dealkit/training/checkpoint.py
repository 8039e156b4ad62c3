"""A run on disk: one safetensors file that is written beside its place and renamed, so it is whole or the old one."""
from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dealkit.training.config import DealConfig

NAME = "checkpoint.safetensors"
FILES = (NAME, "model.safetensors", "history.csv", "config.json")


def prepare_folder(out_dir: str | Path, resume: bool) -> Path:
    """Make the folder of a run, or say why it cannot be used.

    Raises:
        PermissionError: the folder cannot be made or written.
        FileExistsError: it holds a run already and `resume` is False.

    Warns:
        UserWarning: it holds no run, and `resume` is True.
    """
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise PermissionError(f"out_dir {str(out_dir)!r} is not writable ({error}); choose another folder") from error
    if (folder / NAME).exists() and not resume:
        raise FileExistsError(f"{folder / NAME} exists; pass resume=True to go on with that run, or another out_dir")
    if resume and not (folder / NAME).exists():
        warnings.warn(f"there is no run in {str(folder)!r} to go on with: this one starts from its beginning",
                      stacklevel=5)
    for name in FILES:                                       # what a process that was killed could not clear away
        for left in folder.glob(f".{name}.*.tmp"):
            left.unlink(missing_ok=True)
    return folder


def save_checkpoint(folder: Path, step: int, model, optimizer, history: list[list[float]], settings: dict,
                    scaler: torch.amp.GradScaler | None = None) -> None:
    """Weights, Adam's moments and the history of the first `step` steps; OSError where they cannot be written.

    `settings` is whatever must be the same when the run goes on: the config, the number of images, the concepts. The
    scale of float16's loss is kept where there is one.
    """
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
    if scaler is not None and scaler.is_enabled():
        tensors |= {f"scaler.{k}": torch.tensor(v, dtype=torch.float64) for k, v in scaler.state_dict().items()}
    tensors["history"] = torch.tensor(history, dtype=torch.float64)
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    temporary = folder / f".{NAME}.{os.getpid()}.tmp"
    try:
        save_file(tensors, temporary, metadata={"step": str(step), "settings": json.dumps(settings)})
        _flush(temporary)
        os.replace(temporary, folder / NAME)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write the checkpoint of step {step} to {str(folder)!r}: {error}. Check that the folder "
                      "is there and has space; then go on with resume=True") from error
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Have the content on the disk before the file gets its name: a power cut must not leave the name alone."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a small file in one step: a reader sees the old one or the new one, never a half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(folder: Path, model, optimizer, settings: dict,
                    scaler: torch.amp.GradScaler | None = None) -> tuple[int, list[list[float]]]:
    """Put a saved run back into `model`, `optimizer` and `scaler` -> (steps done, history of each).

    (0, []) where nothing was saved yet.

    Raises:
        ValueError: the run was made with other settings (config, images, concepts), or for a model of another
            architecture; a damaged file.

    Warns:
        UserWarning: the run began with other weights than `model` has.
    """
    path = folder / NAME
    if not path.exists():
        return 0, []
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}
            step, before = int(file.metadata()["step"]), json.loads(file.metadata()["settings"])
    except (SafetensorError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged or not a checkpoint of finetune ({error!r}); "
                         "choose another out_dir") from error
    # a run of an earlier version did what the defaults of newer settings say
    before = json.loads(json.dumps(asdict(DealConfig()))) | before
    now = json.loads(json.dumps(settings))
    start, now_start = before.get("start"), now.pop("start", None)
    differ = [f"{k}: {str(before.get(k))[:80]} then, {str(now.get(k))[:80]} now"
              for k in now if before.get(k) != now.get(k)]
    if differ:
        raise ValueError(f"the run in {str(folder)!r} has another config ({'; '.join(differ)}); resume it with the "
                         "config it was started with, or choose another out_dir")
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    if shapes != {k: tuple(v.shape) for k, v in weights.items()}:
        raise ValueError(f"the run in {str(folder)!r} trains a model of another architecture; load that one, "
                         "or choose another out_dir")
    if None not in (start, now_start) and start != now_start:
        warnings.warn(f"the run in {str(folder)!r} began with other weights than this model has now; it goes on from "
                      "its own. If this is not a run that you broke off, choose another out_dir.", stacklevel=4)
    settings["start"] = start
    model.load_state_dict(weights)
    state = optimizer.state_dict()
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".")
            state["state"].setdefault(int(i), {})[key] = value
    optimizer.load_state_dict(state)
    if scaler is not None and scaler.is_enabled():
        scaler.load_state_dict({k: type(v)(tensors[f"scaler.{k}"].item()) for k, v in scaler.state_dict().items()})
    return step, tensors["history"].tolist()
