"""The bench of a training step: what it prints, from a model so small that it takes a second."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny_clip

BENCH = Path(__file__).parent / "bench"


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import step

    return step


def test_the_json_has_the_seconds_of_all_steps_and_right_maps(step, monkeypatch, capsys):
    name = tiny_clip.register(monkeypatch)
    arguments = ["--json", "--model", name, "--batch", "4", "--k", "3", "--device", "cpu", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["step.py", *arguments])
    assert step.main() in (0, 1)                                         # whether it met its bounds is no matter here
    said = json.loads(capsys.readouterr().out)
    assert list(said["seconds"]) == ["plain", "floor", "deal", "deal_frozen_text", "per_text"]
    assert all(seconds > 0 for seconds in said["seconds"].values())
    assert (said["batch"], said["k"]) == (4, 3) and said["models"][name]["map_difference"] < 1e-4
