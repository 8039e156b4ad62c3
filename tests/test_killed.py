"""kill -9 at any moment: what is on the disk is whole, and the run goes on as if nothing had been."""
from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from killed import BANK, CONFIG, STEPS, run
from safetensors import safe_open
from tiny_birds import bird_vlm, same, weights

from dealkit import finetune
from dealkit.datasets import Birdworld

SCRIPT = Path(__file__).with_name("killed.py")


def run_until_killed(folder: Path, steps: int, seconds: float) -> bool:
    """Kill the run a moment after it has taken that many steps -> whether it was still alive then."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, str(SCRIPT), str(folder)], stdout=subprocess.PIPE, text=True, env=env,
                          stderr=subprocess.DEVNULL) as process:
        for _ in range(steps):
            process.stdout.readline()
        time.sleep(seconds)
        process.kill()
        return process.wait() == -9


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(tmp_path):
    torch.set_num_threads(1)
    whole = bird_vlm()
    table = finetune(whole, Birdworld(n=24), BANK, CONFIG, progress=False)
    assert len(table) == STEPS
    rng, seen = random.Random(0), []
    for _ in range(3):
        alive = run_until_killed(tmp_path, rng.randint(3, 12), rng.random() * .1)
        assert alive
        with safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
            seen.append(int(file.metadata()["step"]))
            assert len(file.get_tensor("history")) == seen[-1]
        rows = pd.read_csv(tmp_path / "history.csv")                     # written just after the checkpoint
        assert seen[-1] - len(rows) in (0, 1)
        pd.testing.assert_frame_equal(rows, table[:len(rows)], rtol=1e-12)
        visible = {name for name in os.listdir(tmp_path) if not name.startswith(".")}
        assert visible == {"checkpoint.safetensors", "history.csv"}
    assert 0 < seen[0] < seen[1] < seen[2] < STEPS             # every life got further
    resumed, again = run(tmp_path)
    assert again.equals(table) and same(weights(resumed), weights(whole))
    assert len(os.listdir(tmp_path)) == 4                                # what the dead left half-written is gone


def test_what_a_dead_process_left_half_written_is_cleared_away(tmp_path):
    left = [tmp_path / f".{name}.12345.tmp" for name in ("checkpoint.safetensors", "model.safetensors", "history.csv")]
    for path in (*left, tmp_path / ".notes.12345.tmp"):
        path.write_text("half")
    with pytest.warns(UserWarning, match="no run in .* to go on with"):
        finetune(bird_vlm(), Birdworld(n=8), BANK, CONFIG.contrastive_only, out_dir=tmp_path, resume=True,
                 save_every=1000, progress=False)
    assert not any(path.exists() for path in left) and (tmp_path / ".notes.12345.tmp").exists()
