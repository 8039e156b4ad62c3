"""Studies: every cell once, cached and resumed; differences paired by hand."""
from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from tiny_birds import BANK, bird_vlm, same, weights

from dealkit import DealConfig, evaluate, finetune, preset, study
from dealkit.datasets import Birdworld
from dealkit.presets import Setup
from dealkit.study import paired_differences, run_cell, run_study

DEAL = DealConfig(lambda_disentangle=1., gamma_localize=.1, overlap="cosine", aggregate="max", lr=1e-3, batch_size=8)
ROWS = {"pretrained": None, "contrastive": DEAL.contrastive_only, "DEAL": DEAL}


def note_cell(row, config, pretrained, seed, notes="", **options) -> dict:
    """Stands in for `run_cell` in the worker processes: leaves a line in a file for every call.

    It fails at one cell as long as a file says so, and from then on takes its time.
    """
    notes, cell = Path(notes), f"{row} {pretrained} {seed}"
    with open(notes / f"{os.getpid()}.txt", "a", encoding="utf-8") as file:
        file.write(f"{cell} {torch.get_num_threads()}\n")
    if (notes / "failed").exists():
        time.sleep(2)
    if (notes / "fails").exists() and (notes / "fails").read_text() == cell:
        (notes / "failed").touch()
        raise RuntimeError("the power went off")
    return {"row": row, "pretrained": pretrained, "seed": seed, "lr": config.lr if config else None,
            "score": len(row) + seed + .1, "nothing": float("nan")}


def notes_of(folder: Path) -> list[str]:
    """What was run since the last call, sorted, each "row pretrained seed threads"."""
    files = list(folder.glob("*.txt"))
    lines = sorted(line for file in files for line in file.read_text(encoding="utf-8").splitlines())
    for file in folder.iterdir():
        file.unlink()
    return lines


# ----------------------------------------------------------------------------------------------------------- one cell


@pytest.fixture
def tiny_preset(monkeypatch):
    def tiny(name, pretrained="default", device=None):
        assert name == "birdworld"
        return Setup(name, bird_vlm(int(pretrained[-1])), Birdworld(n=16), Birdworld("validation", n=16),
                     Birdworld("test", n=32), BANK, DEAL, lambda: bird_vlm(int(pretrained[-1])))
    monkeypatch.setattr(study, "preset", tiny)


def test_a_cell_is_one_fine_tuning_and_one_evaluation(tiny_preset):
    cell = run_cell("DEAL", DEAL, "seed1", 3, insertion_images=0)
    assert (cell["row"], cell["pretrained"], cell["seed"]) == ("DEAL", "seed1", 3)
    vlm = bird_vlm(1)
    finetune(vlm, Birdworld(n=16), BANK, replace(DEAL, seed=3), progress=False)
    expected = evaluate(vlm, Birdworld("test", n=32), BANK, insertion_images=0)
    pd.testing.assert_series_equal(pd.Series(cell).drop(["row", "pretrained", "seed"]).astype(float), expected)


def test_a_cell_without_a_config_is_the_model_as_it_is(tiny_preset):
    cell = run_cell("pretrained", None, "seed0", 0, split="validation", masks=False, insertion_images=0)
    expected = evaluate(bird_vlm(0), Birdworld("validation", n=16), BANK, masks=False, insertion_images=0)
    assert cell["accuracy"] == expected["accuracy"] and cell["overlap_cosine"] == expected["overlap_cosine"]
    assert cell["n"] == 16 and np.isnan(cell["pointing_game"])


def test_a_preset_is_fresh_each_time_and_an_unknown_one_an_error():
    with pytest.raises(ValueError, match="birdworld"):
        preset("catworld")
    one, other = (preset("birdworld", pretrained=None, device="cpu") for _ in range(2))
    assert one.vlm.model is not other.vlm.model
    assert one.bank.categories == one.train.categories and one.config.overlap == "cosine"
    assert {one.train.split, one.validation.split, one.test.split} == {"train", "validation", "test"}
    torch.manual_seed(0)
    before = weights(other.vlm)
    with torch.no_grad():
        one.vlm.model.visual.proj.zero_()
    assert same(before, weights(other.vlm))


# ---------------------------------------------------------------------------------------------------------- the study


def test_a_study_is_cached_cell_by_cell_and_goes_on_where_it_was(tmp_path):
    cache, notes = tmp_path / "cache", tmp_path / "notes"
    notes.mkdir()
    options = {"cache": cache, "processes": 1, "run": note_cell, "notes": str(notes)}
    (notes / "fails").write_text("contrastive seed1 0")                  # the fifth of ten cells
    with pytest.raises(RuntimeError, match="power"):
        run_study(ROWS, **options)
    begun, kept = notes_of(notes), len(list(cache.iterdir()))
    assert 5 <= len(begun) <= 8 and kept == len(begun) - 1, "what is finished is kept, what waits is not begun"
    assert not list(cache.glob("*.tmp"))

    # the same cells again, but one row has another config now: only what is missing or new is run
    rows = {**ROWS, "contrastive": replace(ROWS["contrastive"], lr=.5)}
    table = run_study(rows, **options)
    cells = [("pretrained", "seed0", 0), ("pretrained", "seed1", 0),
             *((row, tag, seed) for row in ("contrastive", "DEAL") for tag in ("seed0", "seed1") for seed in (0, 1))]
    done_before = {line[:-2] for line in begun if not line.startswith("contrastive")}
    lines = notes_of(notes)
    assert [line[:-2] for line in lines] == sorted({" ".join(map(str, cell)) for cell in cells} - done_before)
    assert all(line.endswith(" 1") for line in lines), "a worker uses one thread"
    assert [*zip(table["row"], table["pretrained"], table["seed"])] == cells
    assert table["score"].tolist() == [len(row) + seed + .1 for row, _, seed in cells]
    assert table["lr"].tolist()[2:] == [.5] * 4 + [1e-3] * 4 and table["nothing"].isna().all()

    pd.testing.assert_frame_equal(run_study(rows, **options), table)
    assert notes_of(notes) == [], "a second call does no work"


# ---------------------------------------------------------------------------------------------------- the differences


def table_of(values: dict[str, dict[tuple[str, int], float]]) -> pd.DataFrame:
    return pd.DataFrame([{"row": row, "pretrained": tag, "seed": seed, "score": score}
                         for row, cells in values.items() for (tag, seed), score in cells.items()])


CELLS = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
HAND = table_of({"base": dict(zip(CELLS, (1., 2., 5., 7.))), "ours": dict(zip(CELLS[::-1], (10., 7., 3., 2.))),
                 "none": {("a", 0): 4., ("b", 0): 6.}})


def test_differences_are_paired_by_both_seeds():
    ours = paired_differences(HAND, "base", ["score"]).set_index("row").loc["ours"]
    differences = np.array([1., 1., 2., 3.])                             # 2-1, 3-2, 7-5, 10-7
    assert ours["mean"] == pytest.approx(1.75) and ours["pairs"] == 4
    low, high = stats.t.interval(.95, 3, 1.75, stats.sem(differences))
    assert (ours["low"], ours["high"]) == pytest.approx((low, high))
    narrow = paired_differences(HAND, "base", ["score"], level=.5).set_index("row").loc["ours"]
    assert low < narrow["low"] < narrow["mean"] < narrow["high"] < high


def test_the_row_without_fine_tuning_is_paired_with_every_seed():
    none = paired_differences(HAND, "base", ["score"]).set_index("row").loc["none"]
    assert none["mean"] == pytest.approx(np.mean([4 - 1, 4 - 2, 6 - 5, 6 - 7])) and none["pairs"] == 4


def test_a_cell_that_is_missing_makes_no_pair():
    for table in (HAND.drop(index=4), HAND.assign(score=HAND["score"].mask(HAND.index == 4))):
        assert HAND.loc[4, ["row", "score"]].tolist() == ["ours", 10.]
        ours = paired_differences(table, "base", ["score"]).set_index("row").loc["ours"]
        assert ours["mean"] == pytest.approx(4 / 3) and ours["pairs"] == 3
    once = paired_differences(HAND[HAND["pretrained"].eq("a") & HAND["seed"].eq(0)], "base", ["score"])
    assert once["mean"].tolist() == [1., 3.] and once[["low", "high"]].isna().all(axis=None)   # one pair: no interval


def test_every_row_and_metric_has_its_line():
    table = HAND.assign(other=-HAND["score"], empty=np.nan)
    lines = paired_differences(table, "base", ["score", "other", "empty"])
    assert list(lines.columns) == ["row", "metric", "mean", "low", "high", "pairs"]
    expected = [(row, metric) for row in ("ours", "none") for metric in ("score", "other", "empty")]
    assert [*zip(lines["row"], lines["metric"])] == expected
    values = lines.set_index(["row", "metric"])["mean"]
    assert values["ours", "other"] == -values["ours", "score"] and np.isnan(values["ours", "empty"])
    assert lines.loc[lines["metric"] == "empty", "pairs"].tolist() == [0, 0]


def test_an_unknown_baseline_is_an_error():
    with pytest.raises(ValueError, match="contrastive.*base, ours, none"):
        paired_differences(HAND, "contrastive", ["score"])
