"""What the README says about results is what the committed study says."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    return pd.read_csv(ROOT / "data" / "birdworld" / "study.csv")


def test_table_is_the_one_of_the_study(study):
    script = runpy.run_path(str(ROOT / "data" / "birdworld" / "study.py"))
    block = re.search(r"<!-- table:.*?-->\n(.*?)\n<!-- end of table -->", README, re.DOTALL).group(1)
    assert block == script["readme_table"](study)


def test_table_of_methods_is_the_one_of_the_study():
    table = pd.read_csv(ROOT / "data" / "birdworld" / "methods.csv")
    script = runpy.run_path(str(ROOT / "data" / "birdworld" / "study.py"))
    assert table.groupby(["method", "row"]).size().unstack()[["contrastive only", "DEAL"]].eq(4).all(axis=None)
    block = re.search(r"<!-- methods:.*?-->\n(.*?)\n<!-- end of methods -->", README, re.DOTALL).group(1)
    assert block == script["methods_table"](table)
    means = table.groupby(["method", "row"])[["pointing_game", "overlap_cosine"]].mean()
    pretrained, deal = means.loc["every_exit", "pretrained"], means.loc["relevance", "DEAL"]
    assert f"in {pretrained['pointing_game']:.0%}".replace("%", " %") in README
    assert f"an overlap of {pretrained['overlap_cosine']:.2f}".replace("0.", ".") in README
    assert f"do in {deal['pointing_game']:.0%}".replace("%", " %") in README


def test_table_of_cost_is_the_one_of_the_bench():
    models = json.loads((ROOT / "tests" / "bench" / "results" / "maps.json").read_text(encoding="utf-8"))["models"]
    block = re.search(r"<!-- cost:.*?-->\n(.*?)\n<!-- end of cost -->", README, re.DOTALL).group(1).splitlines()
    columns = ("floor", "relevance", "gradcam", "gradeclip", "legrad", "captum", "full_model")
    for line, (name, rows) in zip(block[2:], models.items(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == name and cells[1] == f"{rows['floor']['seconds']:.1f} s"
        for key, cell in zip(columns[1:], cells[2:], strict=True):
            assert cell == "" if key not in rows else abs(float(cell) - rows[key]["times_floor"]) < 0.051, (name, key)


def step_table(results: dict) -> str:
    """The README's table of what a training step costs."""
    names = {"plain": "contrastive", "floor": "contrastive, concepts encoded", "deal": "DEAL",
             "deal_frozen_text": "DEAL, text tower frozen", "per_text": "a text at a time, as released"}
    lines = ["| | " + " | ".join(names.values()) + " |", "|---|" + "---|" * len(names)]
    for model, row in results["models"].items():
        seconds, memory = row["seconds"], row["peak_mib"]
        lines.append(f"| {model}, seconds a step | " + " | ".join(f"{seconds[kind]:.1f}" for kind in names) + " |")
        lines.append(f"| {model}, times contrastive | " + " | ".join(
            f"{seconds[kind] / seconds['plain']:.2f}" for kind in names) + " |")
        lines.append(f"| {model}, peak memory, times contrastive | " + " | ".join(
            f"{memory[kind] / memory['plain']:.2f}" for kind in names) + " |")
    return "\n".join(lines)


def test_table_of_steps_is_the_one_of_the_bench():
    results = json.loads((ROOT / "tests" / "bench" / "results" / "step.json").read_text(encoding="utf-8"))
    block = re.search(r"<!-- step:.*?-->\n(.*?)\n<!-- end of step -->", README, re.DOTALL).group(1)
    assert block == step_table(results)
    row = results["models"]["ViT-B-32"]
    assert row["met"]["maps"] and results["batch"] == 16 and results["k"] == 5
    missed = [name for name, met in row["met"].items() if not met]
    assert not missed or all(f"`{name}` was missed" in README for name in missed)


def test_study_has_every_row_on_every_seed(study):
    script = runpy.run_path(str(ROOT / "data" / "birdworld" / "study.py"))
    trained = {name for name, config in script["ROWS"].items() if config is not None}
    counts = study.groupby("row")[["pretrained", "seed"]].apply(lambda rows: len(rows.drop_duplicates()))
    assert (counts[list(trained)] >= 4).all()
    assert {"pretrained", *script["CONTROLS"]} <= set(study["row"])
    assert study["commit"].str.fullmatch(r"[0-9a-f]{7,40}").all()


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?://)([^)#]+)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()
