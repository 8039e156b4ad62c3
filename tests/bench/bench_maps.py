"""What maps cost: `explain` with K = 6 texts against one `encode_image`, both without gradients in the weights.

Floor: below 1.3 for both towers, a CLS-pooled ViT and a ModifiedResNet; one full forward and backward pass per text
would cost well above K. Both are timed in turns in one run on one thread, in CPU seconds, which a busy machine disturbs
less than the clock; random weights; medians. The ratio is what counts.

    python tests/bench/bench_maps.py            # prints JSON; exit status 1 where a floor is missed
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from pathlib import Path

import open_clip
import torch

from dealkit.maps import explain
from dealkit.models import load_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import wake  # noqa: E402

BATCH, TEXTS, ROUNDS = 8, 6, 7
FLOORS = {"ViT-B-32-quickgelu": 1.3, "RN50": 1.3}


def seconds(call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


@torch.no_grad()
def measure(name: str) -> dict:
    torch.manual_seed(0)
    vlm = load_model(name, pretrained=None, device="cpu")
    if name.startswith("RN"):
        wake(vlm)  # the features of an untouched ResNet shrink to denormal numbers, which are slow
    images = torch.randn(BATCH, 3, *vlm.image_size)
    text_emb = torch.randn(TEXTS, vlm.model.visual.output_dim)
    calls = {"encode_image": lambda: vlm.encode_image(images), "explain": lambda: explain(vlm, images, text_emb)}
    for call in calls.values():
        call()  # warm up
    times = {key: [] for key in calls}
    for _ in range(ROUNDS):
        for key, call in calls.items():
            times[key].append(seconds(call))
    medians = {f"{key}_ms": round(1000 * statistics.median(values), 1) for key, values in times.items()}
    ratio = statistics.median(b / a for a, b in zip(times["encode_image"], times["explain"]))
    return {**medians, "ratio": round(ratio, 2), "floor": FLOORS[name], "met": ratio < FLOORS[name]}


def main() -> int:
    torch.set_num_threads(1)
    results = {name: measure(name) for name in FLOORS}
    print(json.dumps({"batch": BATCH, "texts": TEXTS, "rounds": ROUNDS, "threads": 1, "models": results,
                      "python": platform.python_version(), "torch": torch.__version__,
                      "open_clip": open_clip.__version__, "machine": platform.machine()}, indent=1))
    return 0 if all(result["met"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
