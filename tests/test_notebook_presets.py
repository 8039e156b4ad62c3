"""Notebooks 00 and 03 with another preset, as a reader with a GPU and photographs runs them; here with a tiny CLIP."""
from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
import tiny_clip
import tiny_photos

import dealkit
from dealkit import plots

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def run(notebook, monkeypatch, **parameters) -> tuple[dict, list[str]]:
    """Execute its code cells -> its names, and the alternative texts of the figures that it showed."""
    shown = []
    monkeypatch.setattr(plots, "show", lambda fig, alt, **options: (plots.png(fig, **options), shown.append(alt)))
    cells = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells
    cells = [cell for cell in cells if cell.cell_type == "code"]
    names = {"__name__": "__main__"}
    for cell in cells[1:]:                                       # the first one installs
        exec(compile(cell.source, "a cell", "exec"), names)
        if "parameters" in cell.metadata.get("tags", []):
            assert set(parameters) <= set(names), "a parameter that the notebook does not have"
            names |= parameters
    return names, shown


@pytest.mark.parametrize("preset, more", [
    ("cub", {"PRECISION": "bfloat16", "LIMIT": 40}),
    ("oxford_pets", {"PROCESSES": 2, "OUT": "kept"}),            # on a CPU: two processes that talk through gloo
])
def test_the_notebook_runs_with_photographs(preset, more, monkeypatch, tmp_path, capsys):
    name = tiny_clip.register(monkeypatch)
    root = getattr(tiny_photos, f"make_{preset}")(tmp_path / preset)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = {"PRESET": preset, "WEIGHTS": None, "MODEL": name, "DATA": root, "BATCH_SIZE": 16, **more}
    names, shown = run("03_deal_finetuning", monkeypatch, **settings)
    printed = capsys.readouterr().out
    assert len(shown) == 3 and names["config"].batch_size == 16
    assert len(names["test"]) == more.get("LIMIT", len(names["setup"].test))
    assert {"accuracy", "overlap_cosine", "insertion_fidelity"} < set(names["measured"]["DEAL"].dropna().index)
    assert "point_hits" in names["measured"]["DEAL"].dropna() or preset != "cub"
    assert "agrees with the committed study" not in printed and "images a second" in printed
    before, after = (dict(names[key].model.named_parameters()) for key in ("before_vlm", "vlm"))
    assert any(not before[key].equal(after[key]) for key in before) and names["before_vlm"] is not names["vlm"]
    if "OUT" in more:
        kept = dealkit.load_model(name, tmp_path / "kept" / preset / "DEAL" / "model.safetensors", device="cpu")
        assert all(value.equal(after[key]) for key, value in kept.model.named_parameters())


def test_the_tour_runs_with_photographs(monkeypatch, tmp_path):
    name, root, preset = tiny_clip.register(monkeypatch), tiny_photos.make_cub(tmp_path / "cub"), dealkit.preset
    monkeypatch.setattr(dealkit, "preset", lambda chosen: preset(chosen, None, "cpu", name, root))
    names, shown = run("00_tour", monkeypatch, PRESET="cub")
    assert len(shown) == 3 and names["rows"]["DEAL"]["n"] == len(names["test"]) and names["test"].name == "cub"


@pytest.mark.parametrize("notebook", ["01_concept_extraction", "02_entanglement_diagnosis", "04_ablations"])
def test_notebooks_about_birdworld_say_so_at_once(notebook, monkeypatch):
    with pytest.raises(AssertionError, match="with photographs, run 00 and 03"):
        run(notebook, monkeypatch, PRESET="cub")
