"""A small fine-tuning that somebody kills: python killed.py folder."""
from __future__ import annotations

import sys
from pathlib import Path

import torch
from tiny_birds import BANK, bird_vlm

from dealkit import DealConfig, finetune
from dealkit.datasets import Birdworld

CONFIG = DealConfig(lambda_disentangle=1., gamma_localize=.1, overlap="cosine", aggregate="max", guard=1., lr=1e-3,
                    batch_size=8, epochs=16)
STEPS = 48


def run(folder: Path, callback=None):
    """Go on with the run in `folder`, from wherever it is -> (model, history)."""
    torch.set_num_threads(1)
    vlm = bird_vlm()
    return vlm, finetune(vlm, Birdworld(n=24), BANK, CONFIG, out_dir=folder, resume=True, save_every=1, progress=False,
                         callback=callback)


if __name__ == "__main__":
    run(Path(sys.argv[1]), callback=lambda row: print(row["step"], flush=True))
