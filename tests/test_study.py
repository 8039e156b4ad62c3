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
from dealkit.datasets import Birdworld, balance
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
    def tiny(name, pretrained="default", device=None, model=None):
        assert name == "birdworld" and model is None
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


@pytest.fixture
def noted(tiny_preset, monkeypatch):
    """What `finetune`, `evaluate` and `background_reliance` are given, in place of their work."""
    seen = {}

    def note(name, result):
        def stands_in(vlm, *given, **options):
            seen[name] = (*given, options)
            return result
        monkeypatch.setattr(study, name, stands_in)
    note("finetune", None)
    note("evaluate", pd.Series({"accuracy": .5}))
    note("background_reliance", pd.Series({"flipped": .25}))
    return seen


def same_birds(one, other) -> bool:
    """Are they the same pictures of the same species?"""
    return len(one) == len(other) and all(torch.equal(one[i]["image"], other[i]["image"])
                                          and one[i]["label"] == other[i]["label"] for i in (0, 1, len(one) - 1))


def test_without_options_a_cell_sees_the_presets_birds(noted):
    assert run_cell("DEAL", DEAL, "seed0", 2) == {"row": "DEAL", "pretrained": "seed0", "seed": 2, "accuracy": .5}
    images, bank, config, _ = noted["finetune"]
    assert same_birds(images, Birdworld(n=16)) and (bank, config) == (BANK, replace(DEAL, seed=2))
    assert same_birds(noted["evaluate"][0], Birdworld("test", n=32)) and "background_reliance" not in noted


def test_options_reach_the_birds_to_train_with_and_to_evaluate_on(noted):
    train, test = {"correlation": .5, "n": 40}, {"seed": 7, "n": 64}
    cell = run_cell("DEAL", DEAL, "seed0", 0, train=train, test=test, background=True, insertion_images=3)
    images, held = noted["finetune"][0], noted["evaluate"][0]
    assert same_birds(images, Birdworld(n=40, correlation=.5)) and same_birds(held, Birdworld("test", n=64, seed=7))
    assert np.array_equal(images.backgrounds, Birdworld(n=40, correlation=.5).backgrounds)
    assert not np.array_equal(images.backgrounds, Birdworld(n=40).backgrounds)
    assert noted["evaluate"][1:] == (BANK, {"progress": False, "insertion_images": 3})
    assert noted["background_reliance"][0] is held and cell["flipped"] == .25
    run_cell("DEAL", DEAL, "seed0", 0, split="validation", test={"correlation": .5})
    assert same_birds(noted["evaluate"][0], Birdworld("validation", n=16, correlation=.5))


def test_a_balanced_cell_trains_on_a_balanced_draw(noted):
    run_cell("balanced", DEAL, "seed0", 5, balanced=True, train={"n": 640})
    images, birds = noted["finetune"][0], Birdworld(n=640)
    assert images.indices == balance(birds, seed=5).indices != balance(birds, seed=6).indices
    assert same_birds(noted["evaluate"][0], Birdworld("test", n=32))


def test_a_cell_without_a_config_is_not_fine_tuned_whatever_the_options(noted):
    run_cell("pretrained", None, "seed0", 0, balanced=True, train={"correlation": .5})
    assert "finetune" not in noted


def test_a_cell_with_another_model_gets_birds_of_its_size(noted, monkeypatch):
    asked = []

    def other(name, pretrained="default", device=None, model=None):
        asked.append((name, pretrained, model))
        return Setup(name, bird_vlm(), *(Birdworld(split, n=4, size=160) for split in ("train", "validation", "test")),
                     BANK, DEAL, bird_vlm)
    monkeypatch.setattr(study, "preset", other)
    run_cell("ResNet", DEAL, "seed1", 0, model="birdworld-rn")
    assert asked == [("birdworld", "seed1", "birdworld-rn")]
    assert noted["finetune"][0].size == noted["evaluate"][0].size == 160 and len(noted["evaluate"][0]) == 4


def test_settings_of_birds_are_refused_where_there_are_photographs(monkeypatch):
    setup = Setup("cub", bird_vlm(), [], None, [], BANK, DEAL, bird_vlm)
    monkeypatch.setattr(study, "preset", lambda *_, **options: setup)
    with pytest.raises(ValueError, match="train and test are settings of Birdworld's images; 'cub' has none"):
        run_cell("DEAL", DEAL, "openai", 0, preset_name="cub", train={"correlation": .5})


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


def test_rows_may_have_options_and_one_process_needs_no_other(tmp_path):
    calls = []

    def run(row, config, pretrained, seed, **options):                   # no function of a module: it stays here
        calls.append((row, seed, options))
        return {"row": row, "pretrained": pretrained, "seed": seed, "pid": os.getpid(),
                "lr": None if config is None else config.lr, **options}
    rows = {"none": (None, {"split": "validation"}), "plain": DEAL, "other": (replace(DEAL, lr=.5), {"balanced": True}),
            "own": (DEAL, {"split": "own"})}
    options = {"pretrained": ("seed0",), "seeds": (3, 4), "cache": tmp_path, "processes": 0, "run": run,
               "split": "test"}
    table = run_study(rows, **options)
    assert table["row"].tolist() == ["none", *["plain"] * 2, *["other"] * 2, *["own"] * 2]
    assert table["split"].tolist() == ["validation", *["test"] * 4, *["own"] * 2]     # a row's own options win
    assert table["balanced"].tolist()[3:5] == [True, True] and table["balanced"].isna().sum() == 5
    assert table["lr"].tolist()[1:] == [1e-3] * 2 + [.5] * 2 + [1e-3] * 2 and set(table["pid"]) == {os.getpid()}
    assert len(calls) == 7 and len(list(tmp_path.iterdir())) == 7
    assert run_study(rows, **options)["split"].tolist() == table["split"].tolist() and len(calls) == 7


def test_the_cache_tells_options_apart(tmp_path):
    calls = []

    def run(row, config, pretrained, seed, **options):
        calls.append(options)
        return {"row": row, "pretrained": pretrained, "seed": seed, "number": len(calls)}

    def study_of(row, **options):
        return run_study({"row": row}, ("seed0",), (0,), tmp_path, 0, run, **options)["number"].tolist()
    variants = [(DEAL, {}), ((DEAL, {"train": {"correlation": .5}}), {}), ((DEAL, {"train": {"correlation": .8}}), {}),
                ((DEAL, {"balanced": True}), {}), (DEAL, {"background": True}), (replace(DEAL, swap=.5), {}),
                ((None, {"model": "birdworld-rn"}), {})]
    numbers = [study_of(row, **options) for row, options in variants]
    assert numbers == [[i + 1] for i in range(len(variants))]
    assert [study_of(row, **options) for row, options in variants] == numbers and len(calls) == len(variants)
    # said for a row or for all of them, it is the same cell
    assert study_of(DEAL, balanced=True) == numbers[3] and study_of((DEAL, {"background": True})) == numbers[4]


def test_one_process_keeps_what_is_finished(tmp_path):
    """An error stops the study; what was done before it is not done again."""
    done = []

    def run(row, config, pretrained, seed):
        if seed == 2 and len(done) == 2:
            done.append("failed")
            raise RuntimeError("the power went off")
        done.append(seed)
        return {"row": row, "pretrained": pretrained, "seed": seed}
    options = {"pretrained": ("seed0",), "seeds": (0, 1, 2, 3), "cache": tmp_path, "processes": 0, "run": run}
    with pytest.raises(RuntimeError, match="power"):
        run_study({"DEAL": DEAL}, **options)
    assert run_study({"DEAL": DEAL}, **options)["seed"].tolist() == [0, 1, 2, 3] and done == [0, 1, "failed", 2, 3]


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
