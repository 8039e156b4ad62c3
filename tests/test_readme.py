"""What the README says about results is what the committed study says."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pandas as pd
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


FOLDER = ROOT / "data" / "birdworld"
TABLES = runpy.run_path(str(FOLDER / "tables.py"))


def runs_of(name: str) -> pd.DataFrame:
    return pd.read_csv(FOLDER / f"{name}.csv")


@pytest.mark.parametrize("name", ["table", "methods", "spurious", "heldout"])
def test_a_table_is_the_one_of_the_study(name):
    block = re.search(rf"<!-- {name}:.*?-->\n(.*?)\n<!-- end of {name} -->", README, re.DOTALL).group(1)
    assert block == TABLES["all_tables"](FOLDER)[name]


def test_tables_go_to_their_places_and_nowhere_else():
    text = "a\n<!-- one: made -->\nold\nolder\n<!-- end of one -->\nb\n"
    assert TABLES["into_readme"](text, {"one": "new"}) == "a\n<!-- one: made -->\nnew\n<!-- end of one -->\nb\n"
    with pytest.raises(ValueError, match="one line <!-- two:"):
        TABLES["into_readme"](text, {"two": "new"})


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


def test_every_table_has_every_row_on_every_seed():
    """Six pairs of seeds in the ablations and on the held-out seeds, four elsewhere; and a commit that made them."""
    script = runpy.run_path(str(FOLDER / "study.py"))
    trained = {name for name, (config, _) in script["ROWS"].items() if config is not None}
    trained |= set(script["RESNETS"])
    study, heldout, spurious, methods = (runs_of(name) for name in ("study", "heldout", "spurious", "methods"))
    seeds = lambda table, by="row": table.groupby(by)[["pretrained", "seed"]].apply(      # noqa: E731
        lambda rows: len(rows.drop_duplicates()))
    assert set(seeds(study).index) == {*trained, "pretrained", *script["CONTROLS"]}
    assert (seeds(study)[list(trained)] == 6).all()
    assert (seeds(heldout).drop("pretrained") == 6).all() and set(heldout["pretrained"]) == {"seed2", "seed3"}
    assert not set(heldout["seed"]) & {0, 1, 2, 100, 101}, "no seed that anything was chosen with"
    assert (seeds(spurious, ["row", "correlation"]) == 4).all() and set(spurious["correlation"]) == {.5, .8, 1.}
    assert seeds(methods, ["method", "row"]).unstack()[["contrastive only", "DEAL"]].eq(4).all(axis=None)
    for name in (*script["TABLES"], ):
        assert runs_of(name)["commit"].str.fullmatch(r"[0-9a-f]{7,40}").all()
    # what the ablations do not need is not in them: the choice saw no mask
    assert runs_of("choice")["mass_in_mask"].isna().all() and runs_of("choice")["pointing_game"].isna().all()


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?://)([^)#]+)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_the_code_runs_as_it_stands(tmp_path, monkeypatch):
    """The block under "In your own code", on pictures in folders; a tiny CLIP stands for OpenAI's."""
    import PIL.Image
    from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg

    import dealkit
    from dealkit.models import VLM, WordTokenizer

    section = README[README.index("## In your own code"):]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    words = sorted(set(re.findall(r"[a-z]+", " ".join(re.findall(r'"([a-z ]+)"', code)))) | set("a photo of with and".split()))
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        for number, category in enumerate(("robin", "tern")):
            folder = tmp_path / "pictures" / part / category
            folder.mkdir(parents=True)
            for k in range(3):
                PIL.Image.new("RGB", (40, 40), (200 * number, 60 * k, 90)).save(folder / f"{k}.png")

    def load_model(name, pretrained):
        torch.manual_seed(0)
        text = CLIPTextCfg(context_length=20, vocab_size=len(words) + 3, width=16, heads=2, layers=2)
        vision = CLIPVisionCfg(image_size=32, patch_size=8, width=32, layers=2, head_width=8)
        return VLM("tiny", CLIP(24, vision, text).eval(), tokenizer=WordTokenizer(words, 20))

    monkeypatch.setattr(dealkit, "load_model", load_model)
    space = {}
    exec(code, space)
    assert not torch.equal(space["before"].model.visual.conv1.weight, space["vlm"].model.visual.conv1.weight)
    assert space["vlm"].model.visual.conv1.weight.isfinite().all() and len(space["history"]) >= 1
    assert 0 <= space["row"]["accuracy"] <= 1 and (tmp_path / "mine.safetensors").exists()
