"""How fast Birdworld is painted: run as a script it prints JSON; pytest -m bench on this file asserts the floor."""
from __future__ import annotations

import json
import time

import pytest
import torch

from dealkit.datasets import Birdworld

FLOOR = 300                                # images a second on one core, at 80 pixels
IMAGES = 640


def images_per_second(size: int, repeats: int = 3) -> float:
    """The best of some repeats; each paints fresh birds, masks included, in batches of 64."""
    best = float("inf")
    for repeat in range(repeats):
        birds = Birdworld("train", n=IMAGES, size=size, seed=repeat)
        start = time.perf_counter()
        for first in range(0, IMAGES, 64):
            birds.batch(range(first, first + 64))
        best = min(best, time.perf_counter() - start)
    return IMAGES / best


def measure() -> dict:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        speed = {size: images_per_second(size) for size in (64, 80, 96)}
    finally:
        torch.set_num_threads(threads)
    return {"images_per_second": {str(size): round(value) for size, value in speed.items()}, "floor": FLOOR,
            "ratio": round(speed[80] / FLOOR, 2)}


@pytest.mark.bench
def test_birds_are_painted_fast_enough():
    assert measure()["ratio"] >= 1


if __name__ == "__main__":
    print(json.dumps(measure()))
