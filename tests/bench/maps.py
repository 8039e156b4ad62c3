"""What maps cost: `explain` for K = 6 texts and 16 images, in time and in memory, against three ways to do it.

- floor: one `encode_image`, without gradients;
- captum: Captum's own call, once a text, through the full model: LayerGradCam on a ResNet, InputXGradient on a ViT,
  both with no gradient for any weight;
- full_model: one forward and one backward pass through the full model a text, as in the released code.

To reach: each method at most 1.25 x the floor, and at least 5 x faster than the other two. All are timed in turns in
one process on one thread, in CPU seconds, which a busy machine disturbs less than the clock; ratios are taken round by
round, and the median is shown. Peak memory is what the process holds at most during a call, beyond what it held before
(Linux only). Random weights; the texts are embeddings, so that no side pays for the text tower.

    python tests/bench/maps.py                  # a table; exit status 1 where a target is missed
    python tests/bench/maps.py --json           # the same as JSON
    python tests/bench/maps.py --models RN50 --rounds 5
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import captum
import open_clip
import timm
import torch
import torch.nn.functional as F
from captum.attr import InputXGradient, LayerGradCam

import dealkit
from dealkit.maps import explain
from dealkit.models import VLM, load_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import wake  # noqa: E402

BATCH, TEXTS = 16, 6
MODELS = ("ViT-B-32", "ViT-B-16", "RN50")
TO_REACH = {"floor": 1.25, "captum": 5.0, "full_model": 5.0}  # at most, at least, at least


def build(name: str) -> VLM:
    torch.manual_seed(0)
    vlm = load_model(name, pretrained=None, device="cpu")
    return wake(vlm) if name.startswith("RN") else vlm  # an untouched ResNet computes with denormal numbers: slow


def per_text_captum(vlm: VLM, images: torch.Tensor, text_emb: torch.Tensor) -> None:
    def score(pixels: torch.Tensor) -> torch.Tensor:
        return F.normalize(vlm.model.encode_image(pixels), dim=-1) @ F.normalize(text_emb, dim=-1).T

    layer = getattr(vlm.model.visual, "layer4", None)
    for k in range(len(text_emb)):
        if layer is None:
            InputXGradient(score).attribute(images.clone().requires_grad_(), target=k)
        else:
            LayerGradCam(score, layer).attribute(images, target=k, relu_attributions=True)


def per_text_full_model(vlm: VLM, images: torch.Tensor, text_emb: torch.Tensor) -> None:
    for text in text_emb:
        F.cosine_similarity(vlm.model.encode_image(images), text[None]).sum().backward()
        vlm.model.zero_grad()


def calls_for(vlm: VLM) -> dict[str, Callable[[], object]]:
    """What is measured, by name; each call leaves the weights without gradients."""
    images, text_emb = torch.randn(BATCH, 3, *vlm.image_size), torch.randn(TEXTS, vlm.tower.output_dim)
    weights = list(vlm.model.parameters())

    def frozen(call: Callable[[], object]) -> None:
        for weight in weights:
            weight.requires_grad_(False)
        call()
        for weight in weights:
            weight.requires_grad_(True)

    return {"floor": torch.no_grad()(lambda: vlm.encode_image(images)),
            **{method: lambda method=method: explain(vlm, images, text_emb, method=method)
               for method in vlm.tower.methods},
            "captum": lambda: frozen(lambda: per_text_captum(vlm, images, text_emb)),
            "full_model": lambda: per_text_full_model(vlm, images, text_emb)}


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def held_mib(what: str = "VmRSS") -> float:
    """What the process holds, or with "VmHWM" has held at most, in MiB; OSError where nobody counts (not Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) / 1024


def trim() -> None:
    """Give back what the allocator keeps for later: it would hide what a call needs."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_mib(call: Callable[[], object], before: float | None = None) -> float | None:
    """The most that the process holds during a call beyond `before`, in MiB; None where nobody counts.

    before: what it held at some earlier time; None is just before the call.
    """
    trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the old peak
        before = held_mib() if before is None else before
        call()
        return round(held_mib("VmHWM") - before, 1)
    except OSError:
        return None


def measure(name: str, rounds: int) -> dict:
    vlm = build(name)
    calls = calls_for(vlm)
    memory = {key: peak_mib(call) for key, call in calls.items()}  # this also warms everything up
    times = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            times[key].append(seconds(call))

    def ratio(a: str, b: str) -> float:
        return round(statistics.median(x / y for x, y in zip(times[a], times[b])), 2)

    rows = {key: {"seconds": round(statistics.median(times[key]), 3), "peak_mib": memory[key],
                  "times_floor": ratio(key, "floor")} for key in calls}
    for method in vlm.tower.methods:
        faster = {f"faster_than_{key}": ratio(key, method) for key in ("captum", "full_model")}
        met = rows[method]["times_floor"] <= TO_REACH["floor"] and all(
            faster[f"faster_than_{key}"] >= TO_REACH[key] for key in ("captum", "full_model"))
        rows[method] |= {**faster, "met": met}
    return rows


def table(results: dict[str, dict]) -> str:
    columns = ("seconds", "peak_mib", "times_floor", "faster_than_captum", "faster_than_full_model", "met")
    lines = [f"{'':22}" + "".join(f"{column:>24}" for column in columns)]
    for model, rows in results.items():
        lines += [f"{model:10}{key:12}" + "".join(f"{str(row.get(column, '')):>24}" for column in columns)
                  for key, row in rows.items()]
    return "\n".join(lines)


def processor() -> str:
    """The processor's name where Linux tells it, else its kind."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="open_clip names")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: measure(name, options.rounds) for name in options.models}
    setting = {"batch": BATCH, "texts": TEXTS, "rounds": options.rounds, "threads": 1, "to_reach": TO_REACH,
               "python": platform.python_version(), "torch": torch.__version__, "open_clip": open_clip.__version__,
               "timm": timm.__version__, "captum": captum.__version__, "dealkit": dealkit.__version__,
               "processor": processor()}
    print(json.dumps({**setting, "models": results}, indent=1) if options.json else
          table(results) + "\n" + ", ".join(f"{key} {value}" for key, value in setting.items()))
    return 0 if all(row.get("met", True) for rows in results.values() for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
