"""200 calls of every method leave the process at the same size, and the model as it was.

On Birdworld's tiny model, in a process of its own, where no memory that other tests gave back hides a leak.
"""

from __future__ import annotations

import os
import subprocess
import sys

CALLS = """
import gc
import psutil, torch
from dealkit import explain, load_model
from dealkit.attribution import METHODS, attribute

torch.set_num_threads(1)
kept = []
vlm = load_model("birdworld-vit", device="cpu")
frozen = vlm.model.visual.conv1.weight.requires_grad_(False)
texts, images = ["red head", "blue wing", "green belly"], torch.rand(2, 3, *vlm.image_size)

def explained(method):
    return lambda number: explain(vlm, images, texts, method=method, create_graph=number % 2 == 1)

def attributed(number):  # in turns; occlusion, which is a hundred images a call, in every twentieth
    method = "occlusion" if number % 20 == 0 else ("input_x_gradient", "integrated_gradients")[number % 2]
    return attribute(vlm, images[:1], texts[:2], method=method, steps=2)

def grown(call, calls, leak=lambda maps: None):
    before = psutil.Process().memory_info().rss
    for number in range(calls):
        leak(call(number))
    gc.collect()
    return (psutil.Process().memory_info().rss - before) / 2**20

def state():  # everything that a call could leave behind, but memory
    modules, weights = list(vlm.model.modules()), list(vlm.model.parameters())
    return ([len(getattr(m, name)) for m in modules for name in (
                "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")],
            [m.training for m in modules], [sorted(vars(m)) for m in modules],
            [w.requires_grad for w in weights], [w.grad is None for w in weights],
            [len(w._backward_hooks or ()) for w in weights], images.requires_grad, torch.is_grad_enabled())

before = state()
assert not any(before[0]) and all(before[4]) and not frozen.requires_grad
for name, call in {**{method: explained(method) for method in vlm.tower.methods}, "attribute": attributed}.items():
    grown(call, 20)  # the allocator settles
    print(name, min(grown(call, 50) for _ in range(4)))  # it breathes by some MiB; a leak grows in every quarter
print("leak", min(grown(explained("relevance"), 50, leak=kept.append) for _ in range(2)))
assert state() == before, "a call has left something behind"
vlm.model.visual.conv1.register_forward_hook(lambda *_: None)
assert state() != before
"""


def test_200_calls_leave_nothing_behind():
    """A leak made on purpose shows: maps that are kept, each second one with its graph; so does a hook."""
    answer = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, timeout=300,
                            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"})
    assert answer.returncode == 0, answer.stderr
    grown = {name: float(mib) for name, mib in map(str.split, answer.stdout.splitlines())}
    assert grown.pop("leak") > 12 and len(grown) == 6
    assert max(grown.values()) < 1.5, grown  # MiB
