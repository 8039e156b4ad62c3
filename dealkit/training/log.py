"""What a run tells while it goes on: a bar, a file of numbers, TensorBoard, and whoever wants to draw a curve."""
from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from dealkit.training.checkpoint import write_text
from dealkit.training.config import DealConfig


def check_tensorboard(out_dir: str | Path | None) -> None:
    """Raise where TensorBoard's events have no place to go, or nothing to be written with.

    Raises:
        ValueError: no out_dir. ImportError: the package tensorboard is not installed.
    """
    if out_dir is None:
        raise ValueError("tensorboard=True writes to out_dir/tensorboard; give an out_dir")
    if not is_tensorboard_available():
        raise ImportError("tensorboard=True needs the package tensorboard: pip install tensorboard. history.csv has "
                          "the same numbers without it.")


def is_tensorboard_available() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def start_tensorboard(folder: Path, done: int):
    """A writer to folder/tensorboard; what a killed run wrote after step `done` is disregarded there.

    torch's own: accelerate's would set up its processes, which a single one must not (see `processes`).
    """
    from torch.utils.tensorboard import SummaryWriter            # here, because few install the package

    return SummaryWriter(str(folder / "tensorboard"), purge_step=done)


def tidy(history: list[list[float]], columns: tuple[str, ...], images: int, config: DealConfig) -> pd.DataFrame:
    """One row a step: its number and epoch, then `columns`."""
    table = pd.DataFrame(history, columns=list(columns))
    table.insert(0, "step", range(len(table)))
    table.insert(1, "epoch", table.step // math.ceil(images / config.batch_size))
    return table


def write_history(folder: Path, table: pd.DataFrame) -> None:
    write_text(folder / "history.csv", table.to_csv(index=False, lineterminator="\n"))


def write_config(folder: Path, config: DealConfig) -> None:
    write_text(folder / "config.json", json.dumps(asdict(config), indent=1) + "\n")


def tell(row: dict, callback: Callable[[dict], object] | None, writer) -> None:
    """Pass the row of a step on."""
    if writer is not None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, row["step"])
    if callback is not None:
        callback(row)
