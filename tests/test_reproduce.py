"""One command a data set: its results file, and the paper's table that is filled from such files alone."""
from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import tiny_clip
import tiny_photos
import torch
from accelerate import PartialState

import dealkit
from dealkit.presets import BATCH_SIZES, PHOTOGRAPHS

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data" / "reproduce.py"
# What FACTS of the paper's Table 1 say in another form: the averages that it prints.
AVERAGES = {("CLIP", "disentanglability"): .400, ("FLAVA", "insertion_fidelity"): .580, ("DeCLIP", "accuracy"): .491,
            ("PyramidCLIP", "disentanglability"): .071, ("CLIPpy", "insertion_fidelity"): .577,
            ("DEAL", "accuracy"): .788}


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def reproduce(monkeypatch, tmp_path, capsys):
    name, root = tiny_clip.register(monkeypatch), tiny_photos.make_oxford_pets(tmp_path / "pets")

    def call(*options):
        monkeypatch.setattr(sys, "argv", [
            "reproduce.py", "oxford_pets", "--model", name, "--weights", "none", "--device", "cpu", "--data", str(root),
            "--no-download", "--workers", "0", "--insertion-images", "1", "--out", str(tmp_path / "out"), *options])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        file = "oxford_pets-paper.json" if "paper" in options else "oxford_pets.json"
        return json.loads((tmp_path / "out" / "results" / file).read_text(encoding="utf-8"))
    yield call
    PartialState._reset_state()          # the script is a process of its own elsewhere, and nothing stays of it


def test_one_command_makes_the_results_of_a_preset(reproduce, tmp_path):
    results = reproduce("--seeds", "2", "--batch-size", "20")
    assert [(run["row"], run["seed"]) for run in results["runs"]] == [
        ("random maps", 0), ("centre maps", 0), ("uniform maps", 0), ("pretrained", 0),
        ("contrastive only", 0), ("DEAL", 0), ("contrastive only", 1), ("DEAL", 1)]
    accuracy = [run["accuracy"] for run in results["runs"] if run["row"] == "DEAL"]
    assert results["rows"]["DEAL"]["accuracy"]["mean"] == pytest.approx(sum(accuracy) / 2)
    low, mean, high = (results["rows"]["pretrained"]["insertion_fidelity"][end] for end in ("low", "mean", "high"))
    assert low <= mean <= high and results["rows"]["pretrained"]["pointing_game"]["mean"] is None     # no masks: no NaN
    difference = results["deal_minus_contrastive_only"]["overlap_cosine"]
    control = [run["overlap_cosine"] for run in results["runs"] if run["row"] == "contrastive only"]
    ours = [run["overlap_cosine"] for run in results["runs"] if run["row"] == "DEAL"]
    assert difference["mean"] == pytest.approx(sum(ours) / 2 - sum(control) / 2) and difference["pairs"] == 2
    assert results["changed"] == ["batch_size"] and results["config"]["batch_size"] == 20
    assert results["images"]["train"] > 20 and results["categories"] == 37
    assert {"commit", "device", "versions", "command", "date", "seconds", "peak_memory_mib"} <= set(results)
    assert all(value > 0 for value in results["seconds"].values()) and "DEAL, seed 1" in results["peak_memory_mib"]
    assert results["insertion_images"] == 1
    # once more: the trained weights are found, nothing is trained again, the numbers and what they cost are the same
    path = run_folder(tmp_path, "deal-seed-1") / "checkpoint.safetensors"
    stamp = path.stat().st_mtime_ns
    again = reproduce("--seeds", "2", "--batch-size", "20")
    assert [run["accuracy"] for run in again["runs"]] == [run["accuracy"] for run in results["runs"]]
    assert path.stat().st_mtime_ns == stamp and again["seconds"]["DEAL, seed 1"] == results["seconds"]["DEAL, seed 1"]


def run_folder(tmp_path: Path, name: str) -> Path:
    (found,) = (tmp_path / "out" / "runs" / "oxford_pets").glob(f"*/{name}")
    return found


def test_the_papers_form_has_results_of_its_own(reproduce, tmp_path):
    """The paper's losses and weights with the preset's batch and rate; no figure of the table comes from there."""
    results = reproduce("--seeds", "1", "--batch-size", "20", "--form", "paper")
    config, paper = results["config"], dealkit.DealConfig()
    for name in ("overlap", "aggregate", "lambda_disentangle", "gamma_localize", "guard", "stop_text_gradient"):
        assert config[name] == getattr(paper, name)
    assert config["lr"] == PHOTOGRAPHS.lr and "form" in results["changed"]


def test_a_run_that_was_interrupted_does_not_say_what_it_cost(reproduce, tmp_path):
    results = reproduce("--seeds", "1", "--batch-size", "20")
    folder = run_folder(tmp_path, "deal-seed-0")
    (folder / "cost.json").unlink()                                  # as a process leaves it that was killed
    again = reproduce("--seeds", "1", "--batch-size", "20")
    assert again["seconds"]["DEAL, seed 0"] is None and again["peak_memory_mib"]["DEAL, seed 0"] is None
    assert again["seconds"]["contrastive only, seed 0"] == results["seconds"]["contrastive only, seed 0"]


def test_other_weights_are_not_taken_for_the_same_run(reproduce, tmp_path):
    """A try with random weights must not be gone on with as the run of the published ones."""
    first = reproduce("--seeds", "1", "--batch-size", "20")
    vlm = dealkit.load_model(tiny_clip.NAME, None, "cpu")
    vlm.save(tmp_path / "other.safetensors")
    other = reproduce("--seeds", "1", "--batch-size", "20", "--weights", str(tmp_path / "other.safetensors"))
    runs = sorted((tmp_path / "out" / "runs" / "oxford_pets").glob("*/deal-seed-0/model.safetensors"))
    assert len(runs) == 2 and runs[0].read_bytes() != runs[1].read_bytes()
    assert first["rows"]["DEAL"]["overlap_cosine"] != other["rows"]["DEAL"]["overlap_cosine"]


def test_evaluation_loads_images_by_the_same_workers(script, monkeypatch):
    seen = {}
    monkeypatch.setattr(dealkit, "evaluate", lambda *_, **options: seen.update(options) or pd.Series({"accuracy": 1.0}))
    setup = SimpleNamespace(test=None, bank=None, config=dealkit.DealConfig())
    args = SimpleNamespace(insertion_images=3, workers=5)
    assert script["measured"](None, setup, args, SimpleNamespace(is_main_process=True)) == {"accuracy": 1.0}
    assert seen["workers"] == 5 and seen["insertion_images"] == 3


def test_the_cost_is_that_of_the_device_that_was_asked_for(script, monkeypatch):
    """A CPU's, also where there is a GPU that was not used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cost = {"seconds": {}, "peak_memory_mib": {}}
    assert script["timed"](cost, "a step", "cpu", lambda: 7) == 7 and cost["peak_memory_mib"]["a step"] > 10


def test_without_git_the_commit_is_unknown(script, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert script["machine"]("cpu", 1)["commit"] == "unknown"


# ----------------------------------------------------------------------------------------------- the paper's table


@pytest.fixture
def claims() -> pd.DataFrame:
    return pd.read_csv(ROOT / "data" / "claims.csv", dtype={"commit": str, "figure": str})


def test_every_figure_of_table_1_is_there(claims):
    paper = claims[claims["source"] == "Table 1"]
    assert len(paper) == 6 * 3 * 6 and paper["paper"].notna().all()
    table = paper.pivot(index=["model", "metric"], columns="preset", values="paper")
    assert len(table) == 18 and set(table.columns) == {*BATCH_SIZES, "average"} - {"waterbirds"}
    for key, average in AVERAGES.items():
        assert table.loc[key, "average"] == average
    mean = table.drop(columns="average").mean(axis=1)
    assert (mean - table["average"]).abs().max() < 0.0016             # rounding; the paper prints three digits


def test_readme_claims_and_results_are_in_step(claims, script):
    """A figure of ours stands in the table if and only if a committed results file has it."""
    again = script["claimed"](claims, ROOT / "data" / "results")
    committed = (ROOT / "data" / "claims.csv").read_text(encoding="utf-8")
    assert again.to_csv(index=False, float_format="%.6g", lineterminator="\n") == committed
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- claims:.*?-->\n(.*?)\n<!-- end of claims -->", readme, re.DOTALL).group(1)
    assert block == script["claims_table"](claims)


# as the data sets' makers say: to train, to test
IMAGES = {"cub": (5994, 5794), "food101": (75750, 25250), "oxford_pets": (3680, 3669), "eurosat": (24000, 3000),
          "imagenet": (1281167, 50000)}


def results_file(folder: Path, preset="cub", **changes) -> None:
    folder.mkdir(exist_ok=True)
    train, test = IMAGES[preset]
    rows = {"DEAL": {"accuracy": {"mean": .7, "low": .6, "high": .8}, "disentanglability": {"mean": None}}}
    results = {"preset": preset, "model": "ViT-B-32-quickgelu", "weights": "default", "changed": [],
               "images": {"train": train, "test": test}, "insertion_images": 512, "commit": "abc1234",
               "rows": rows} | changes
    (folder / f"{preset}.json").write_text(json.dumps(results), encoding="utf-8")


def test_results_fill_the_table_and_averages_wait_for_all_five(claims, script, tmp_path):
    presets = ["cub", "food101", "oxford_pets", "eurosat", "imagenet"]
    for preset in presets[:4]:
        results_file(tmp_path, preset)
    filled = script["claimed"](claims, tmp_path).query("model == 'DEAL' and metric == 'accuracy'").set_index("preset")
    assert filled.loc["cub", ["ours", "low", "high", "commit"]].tolist() == [.7, .6, .8, "abc1234"]
    assert pd.isna(filled.loc["imagenet", "ours"]) and pd.isna(filled.loc["average", "ours"])
    results_file(tmp_path, "imagenet")
    filled = script["claimed"](claims, tmp_path)
    accuracy = filled.query("model == 'DEAL' and metric == 'accuracy'").set_index("preset")
    assert accuracy.loc["average", "ours"] == pytest.approx(.7)
    assert filled.loc[filled["source"] != "Birdworld", "ours"].notna().sum() == 6 and "0.696 → 0.700" in script["claims_table"](filled)


@pytest.mark.parametrize("changes", [{"weights": "none"}, {"model": "ViT-B-16"}, {"changed": ["lr"]},
                                     {"commit": "abc1234-dirty"}, {"commit": "unknown"}, {"insertion_images": 64},
                                     {"images": {"train": 5994, "test": 100}}], ids=lambda changes: next(iter(changes)))
def test_figures_of_something_else_do_not_get_in(claims, script, tmp_path, changes):
    results_file(tmp_path, **changes)
    with pytest.raises(SystemExit, match="not the preset as it stands"):
        script["claimed"](claims, tmp_path)
