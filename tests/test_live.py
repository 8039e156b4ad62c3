"""The plot that is drawn while a run goes on."""
from __future__ import annotations

from io import BytesIO

import numpy as np
import PIL.Image
from tiny_birds import BANK, bird_vlm

from dealkit import finetune
from dealkit.datasets import Birdworld
from dealkit.training import DealConfig
from dealkit.widgets import LossPlot, live

CONFIG = DealConfig(lr=1e-3, batch_size=8)


def pixels(plot: LossPlot) -> np.ndarray:
    return np.asarray(PIL.Image.open(BytesIO(plot.picture.value)).convert("RGB"))


def test_it_shows_the_steps_of_a_run(monkeypatch):
    shown = []
    monkeypatch.setattr(live, "display", shown.append)
    plot = LossPlot(seconds=0)
    history = finetune(bird_vlm(), Birdworld("train", n=32), BANK, CONFIG, progress=False, callback=plot)
    assert shown == [plot.picture]                                # once, whatever the number of steps
    assert [row["step"] for row in plot.rows] == history["step"].tolist()
    assert [row["disentangle"] for row in plot.rows] == history["disentangle"].tolist()
    few = pixels(plot)
    plot.rows = plot.rows[:2]
    plot.draw()
    assert few.std() > 10 and not np.array_equal(few[..., 0][:100, :100], pixels(plot)[..., 0][:100, :100])


def test_a_run_without_a_step_draws_nothing():
    plot = LossPlot()
    plot.draw()
    assert plot.picture.value == b"" and plot.rows == []


def test_it_draws_no_more_often_than_asked(monkeypatch):
    monkeypatch.setattr(live, "display", lambda picture: None)
    clock, plot = [0.0], LossPlot(seconds=5)
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    drawn = []
    monkeypatch.setattr(plot, "draw", lambda: (drawn.append(len(plot.rows)), setattr(plot, "_drawn", clock[0])))
    for second in range(12):
        clock[0] = float(second)
        plot({"step": second, "contrastive": 1.0, "disentangle": 1.0, "localize": 1.0})
    assert drawn == [1, 6, 11] and len(plot.rows) == 12
