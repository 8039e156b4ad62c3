"""Many configurations x pretraining seeds x fine-tuning seeds -> one tidy table, cached cell by cell."""
from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats
from tqdm.auto import tqdm

from dealkit.concepts import ConceptBank
from dealkit.datasets import Birdworld, balance
from dealkit.evaluation import background_reliance, evaluate
from dealkit.presets import preset
from dealkit.training import DealConfig, finetune
from dealkit.training.checkpoint import write_text

Settings = DealConfig | None                                      # None is no fine-tuning
Rows = dict[str, Settings | tuple[Settings, dict]]                # name of a row of the table -> config [, options]


def run_cell(row: str, config: DealConfig | None, pretrained: str, seed: int, preset_name: str = "birdworld",
             split: str = "test", bank: ConceptBank | None = None, progress: bool = False, model: str | None = None,
             train: dict | None = None, test: dict | None = None, balanced: bool = False, background: bool = False,
             **options) -> dict:
    """Fine-tune one fresh model and evaluate it.

    Args:
        row: its name in the table. config: None evaluates the model as it is. pretrained, preset_name, model: see
            `preset`.
        seed: fine-tuning seed. split: "test", or "validation" when choosing settings.
        bank: fine-tune with another bank than the preset's; evaluation always asks for the preset's concepts.
        train, test: settings of Birdworld's images to fine-tune with and to evaluate on that differ from the preset's,
            such as {"correlation": 0.5}, or {"seed": 1} for other birds.
        balanced: fine-tune on a draw in which species and backgrounds are independent, see `balance`.
        background: add the columns of `background_reliance`.
        options: passed on to `evaluate`.

    Returns:
        row, pretrained, seed, and the columns of `evaluate`.

    Raises:
        ValueError: train or test for another preset than Birdworld. As `preset`, `finetune` and `evaluate`.
    """
    if (train or test) and preset_name != "birdworld":
        raise ValueError(f"train and test are settings of Birdworld's images; {preset_name!r} has none")
    setup = preset(preset_name, pretrained=pretrained, model=model)
    images, held = setup.train, getattr(setup, split)
    if preset_name == "birdworld":                        # painted once in each process
        images = _birds("train", **{"n": len(images), "size": images.size, **(train or {})})
        held = _birds(split, **{"n": len(held), "size": held.size, **(test or {})})
    if config is not None:
        images = balance(images, seed=seed) if balanced else images
        finetune(setup.vlm, images, bank or setup.bank, replace(config, seed=seed), progress=progress)
    result = evaluate(setup.vlm, held, setup.bank, progress=progress, **options).to_dict()
    if background:
        result |= background_reliance(setup.vlm, held).to_dict()
    return {"row": row, "pretrained": pretrained, "seed": seed, **result}


_birds = lru_cache(maxsize=6)(Birdworld)


def run_study(rows: Rows, pretrained: tuple[str, ...] = ("seed0", "seed1"), seeds: tuple[int, ...] = (0, 1),
              cache: str | Path | None = None, processes: int | None = None, run: Callable[..., dict] = run_cell,
              **options) -> pd.DataFrame:
    """Every row on every pretraining seed with every fine-tuning seed. Killed half-way, it goes on where it was.

    Args:
        rows: name -> DealConfig (None: the model as it is, evaluated once a pretraining seed), or a pair of that and
            options for this row alone.
        pretrained, seeds: what the rows are crossed with.
        cache: folder with one JSON file a finished cell; None keeps nothing. A cell is found again only with the same
            config and options.
        processes: worker processes of one thread each; 0 runs all cells in this one, one after the other. None is one
            process a core, and 0 where there is a GPU: it is one, and cells that share it would wait for each other.
        run: does one cell; a function of a module, for another process imports it. One cache folder serves one `run`.
        options: passed on to `run`.

    Returns:
        One row a cell, in the order asked for.
    """
    own = {row: setting if isinstance(setting, tuple) else (setting, {}) for row, setting in rows.items()}
    cells = [(row, config, tag, seed, options | extra) for row, (config, extra) in own.items() for tag in pretrained
             for seed in (seeds if config is not None else seeds[:1])]
    files = [_cell_file(cache, cell) for cell in cells]
    results = {i: json.loads(f.read_text()) for i, f in enumerate(files) if f is not None and f.exists()}
    todo = [i for i in range(len(cells)) if i not in results]
    bar = tqdm(total=len(cells), initial=len(results), desc="study")
    if processes is None:
        processes = 0 if torch.cuda.is_available() else os.cpu_count()
    if processes == 0:
        for i in todo:
            results[i] = _run_and_keep(run, files[i], cells[i])
            bar.update()
    else:
        # spawn, not fork: a forked process inherits the thread pools of torch in an unusable state
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"),
                                 initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = {pool.submit(_run_and_keep, run, files[i], cells[i]): i for i in todo}
            try:
                for future in as_completed(futures):
                    results[futures[future]] = future.result()
                    bar.update()
            except BaseException:                            # an error or Ctrl-C: do not start what still waits
                pool.shutdown(cancel_futures=True)
                raise
    bar.close()
    return pd.DataFrame([results[i] for i in range(len(cells))])


def paired_differences(table: pd.DataFrame, baseline: str, metrics: list[str], level: float = 0.95) -> pd.DataFrame:
    """How each row differs from the baseline row with the same pretraining and fine-tuning seed.

    Args:
        table: from `run_study`. baseline: name of a row that has every (pretrained, seed). metrics: columns.
        level: of the interval (Student's t over the pairs).

    Returns:
        One line a row and metric: row, metric, mean, low, high, pairs. Rows evaluated once a pretraining seed (no
        fine-tuning) are paired with every fine-tuning seed. A cell that is missing or NaN makes no pair.

    Raises:
        ValueError: the table has no such baseline.
    """
    if baseline not in set(table["row"]):
        raise ValueError(f"no row {baseline!r} to compare with; the table has {', '.join(table['row'].unique())}")
    base = table[table["row"] == baseline].set_index(["pretrained", "seed"])[metrics]
    lines = []
    for row, group in table[table["row"] != baseline].groupby("row", sort=False):
        values = group.set_index(["pretrained", "seed"])[metrics].reindex(base.index)
        if not group["pretrained"].duplicated().any():        # evaluated once a pretraining seed: so for all seeds
            values = values.groupby("pretrained").transform(lambda c: c.fillna(c.mean()))
        difference = values - base
        for metric in metrics:
            d = difference[metric].dropna().to_numpy()
            mean = d.mean() if len(d) else np.nan
            half = stats.t.ppf((1 + level) / 2, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d)) if len(d) > 1 else np.nan
            lines.append({"row": row, "metric": metric, "mean": mean, "low": mean - half, "high": mean + half,
                          "pairs": len(d)})
    return pd.DataFrame(lines)


def _run_and_keep(run, file: Path | None, cell) -> dict:
    """In a worker, so that a finished cell is kept whatever happens to the others."""
    *which, options = cell
    result = run(*which, **options)
    if file is not None:
        write_text(file, json.dumps(result))
    return result


def _cell_file(cache, cell) -> Path | None:
    if cache is None:
        return None
    row, config, tag, seed, options = cell
    text = json.dumps([asdict(config) if config else None, tag, seed, options], sort_keys=True)
    folder = Path(cache)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{hashlib.sha256((row + text).encode()).hexdigest()[:16]}.json"
