"""Several processes are one: the same gradient, the same history, and one set of files."""
from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from launched import BANK, CONFIG, gradients, launch, make, tune
from tiny_birds import Recorder, bird_vlm

from dealkit import finetune
from dealkit.datasets import Birdworld
from dealkit.training import processes as processes_module
from dealkit.training.processes import Processes, Share

GRADIENTS = {
    "six": {"n": 6},
    "five": {"n": 5},
    "one": {"n": 1},                                                     # the second process has none of its own
    "frozen": {"n": 5, "config": {"freeze_text": True, "overlap": "product", "aggregate": "sum"}},
    "recomputed": {"n": 5, "config": {"method": "legrad", "checkpoint_activations": True}},
    "resnet": {"n": 5, "resnet": True},
    "contrastive": {"n": 5, "config": {"lambda_disentangle": 0., "gamma_localize": 0., "guard": 0.}},
}
GRADIENTS = {name: {"do": "gradients"} | job for name, job in GRADIENTS.items()}
MOVING = {
    "limited": {"config": {"limit_disentangle": .2, "limit_localize": 4., "multiplier_rate": .5}},
    "swapped": {"config": {"swap": .8}},
}
MOVING = {name: {"do": "tune", "n": 15} | job for name, job in MOVING.items()}


@pytest.mark.parametrize("total, processes", [(8, 2), (7, 2), (1, 2), (5, 4), (3, 4), (256, 8)])
def test_shares_hold_every_image_once_and_pad_at_the_end(total, processes):
    images = [f"image {i}" for i in range(total)]
    shares = [Share(rank, processes, total) for rank in range(processes)]
    assert {len(share.of(images)) for share in shares} == {-(-total // processes)}
    together = [image for share in shares for image in share.of(images)]
    assert together[:total] == images and set(together) == set(images)   # what is gathered is cut after `total`
    assert sum(share.real for share in shares) == total


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a file that is no folder, and a run of one process that died in its fifth step."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "file").write_text("not a folder")
    with pytest.raises(RuntimeError, match="power"):
        finetune(make({})[0], Recorder(Birdworld(n=15), fails_at=4), BANK, CONFIG, out_dir=folder / "dead",
                 save_every=2, progress=False)
    return folder


@pytest.fixture(scope="module")
def pair(folder):
    """What two processes found: one launch, because starting Python takes longer than all of the jobs."""
    jobs = GRADIENTS | MOVING | {
        "whole": {"do": "tune", "n": 15, "out_dir": str(folder / "run"), "workers": 1},
        "resumed": {"do": "tune", "n": 15, "out_dir": str(folder / "dead"), "resume": True},
        "refused": {"do": "tune", "n": 15, "out_dir": str(folder / "file")}}
    return launch(jobs, folder, ACCELERATE_MIXED_PRECISION="bf16")


@pytest.fixture(scope="module")
def alone():
    """The run of 7 + 7 + 1 images, twice, in this process."""
    return tune({"n": 15})


@pytest.mark.parametrize("name", GRADIENTS)
def test_processes_with_a_share_each_give_the_gradient_of_one_with_all(pair, name):
    expected = gradients(GRADIENTS[name])
    for found in pair:
        assert found[name].keys() == expected.keys()
        for weight, value in expected.items():
            error = (found[name][weight] - value).abs().max()
            assert error <= 1e-5 * value.abs().max() + 1e-14, (weight, error)


def test_a_run_in_two_processes_is_the_run_in_one(pair, alone, folder):
    one, other = (found["whole"] for found in pair)
    assert one["rows"] == len(alone["history"]) == 6 and other["rows"] == 0    # called in the first process alone
    assert one["warned"] == 1 and alone["warned"] == 0                         # launched for bf16, the config says not
    for name in alone.keys() - {"rows", "warned"}:
        assert torch.equal(one[name], other[name]), name
        torch.testing.assert_close(one[name], alone[name], rtol=1e-5, atol=1e-6)
    files = ["checkpoint.safetensors", "config.json", "history.csv", "model.safetensors"]
    assert sorted(os.listdir(folder / "run")) == files
    assert torch.equal(torch.tensor(pd.read_csv(folder / "run" / "history.csv").to_numpy(float)), one["history"])


def test_two_processes_go_on_with_a_run_of_one(pair, alone):
    """Weights, moments and history come from the file, which the first process alone reads."""
    one, other = (found["resumed"] for found in pair)
    assert one["rows"] == 2
    for name in alone.keys() - {"rows", "warned"}:
        assert torch.equal(one[name], other[name]), name
        torch.testing.assert_close(one[name], alone[name], rtol=1e-5, atol=1e-6)


def test_weights_that_look_for_a_constraint_see_the_whole_batch(pair):
    """And so are those of one process, in both."""
    expected, (one, other) = tune(MOVING["limited"]), (found["limited"] for found in pair)
    assert expected["history"].shape[1] == 10 and expected["history"][:, -2].unique().numel() == 6
    for name in expected.keys() - {"rows", "warned"}:
        assert torch.equal(one[name], other[name]), name
        torch.testing.assert_close(one[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_swap_in_two_processes_is_one_run_and_not_that_of_one_process(pair, alone):
    """Each exchanges within its own share, from donors of its own; the weights stay the same in both."""
    one, other = (found["swapped"] for found in pair)
    for name in one.keys() - {"rows", "warned"}:
        assert torch.equal(one[name], other[name]), name
    expected = tune(MOVING["swapped"])["history"]
    assert one["history"].isfinite().all() and one["history"].shape == expected.shape
    for another in (expected, alone["history"]):
        assert not torch.allclose(one["history"], another, rtol=1e-3)


def test_what_the_first_process_cannot_do_stops_all(pair):
    for found in pair:
        message, = found["refused"]
        assert "not writable" in message and "choose another folder" in message


def test_launchers_that_split_the_model_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="launched with FSDP; it splits the batch"):
        Processes(bird_vlm(), "float32")


@pytest.mark.parametrize("gpu, asked, cpu", [(True, "false", False), (True, "true", True), (False, "false", True)])
def test_a_model_that_a_notebook_left_on_the_cpu_goes_to_the_gpu_of_its_process(monkeypatch, gpu, asked, cpu):
    """A stand-in for accelerate's state: this computer may have no GPU."""
    calls, moved, vlm = [], [], bird_vlm()

    class State:
        process_index, num_processes, device = 1, 2, "the launcher's"

        def __init__(self, cpu):
            calls.append(cpu)

    monkeypatch.setattr(processes_module, "PartialState", State)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(type(vlm), "to", lambda self, device: moved.append(device))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", asked)
    Processes(vlm, "float32")
    assert calls == [cpu] and moved == ["the launcher's"]


NOTEBOOK = """
import socket, sys
from accelerate import notebook_launcher
from dealkit import finetune
from dealkit.datasets import Birdworld
from launched import BANK, CONFIG, make

birds = Birdworld(n=15, size=80)
finetune(make({})[0], birds, BANK, CONFIG, progress=False)               # a run alone does not spoil the launches
for folder in sys.argv[1:]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    notebook_launcher(finetune, (make({})[0], birds, BANK, CONFIG, folder, False, 50, False), num_processes=2,
                      use_port=port)
"""


@pytest.mark.slow
def test_a_notebook_launches_two_runs_and_finds_their_files(alone, tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), "OMP_NUM_THREADS": "1",
                        "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, "-c", NOTEBOOK, *map(str, folders)], capture_output=True, text=True, env=env,
                          timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in folders:
        found = torch.tensor(pd.read_csv(folder / "history.csv").to_numpy(float))
        torch.testing.assert_close(found, alone["history"], rtol=1e-5, atol=1e-6)
        assert (folder / "model.safetensors").exists()


def _after_a_fork(vlm) -> None:
    Processes(vlm, "float32")
    torch.randn(8, 3, 224, 224).mul(2).sum()


def test_a_forked_process_does_not_wait_for_threads_that_it_has_not():
    """What notebook_launcher starts; photographs are large enough to be normalised by several threads."""
    threads, vlm = torch.get_num_threads(), bird_vlm()
    torch.set_num_threads(2)
    try:
        torch.randn(8, 3, 224, 224).mul(2).sum()
        child = multiprocessing.get_context("fork").Process(target=_after_a_fork, args=(vlm,))
        child.start()
        child.join(timeout=60)
        hung = child.is_alive()
        child.kill()
        assert not hung and child.exitcode == 0
    finally:
        torch.set_num_threads(threads)
