"""What one of several processes does: python launched.py jobs.json, once for every rank."""
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_birds import BANK, bird_resnet, bird_vlm

from dealkit import DealConfig, finetune
from dealkit.datasets import Birdworld
from dealkit.training.loop import _inputs, _trainable
from dealkit.training.objective import DealObjective
from dealkit.training.processes import Processes
from dealkit.training.step import make_trainer

CONFIG = DealConfig(lambda_disentangle=.7, gamma_localize=.1, overlap="cosine", aggregate="max", guard=.4, lr=1e-3,
                    batch_size=7, epochs=2)


def make(job: dict):
    """The model and the config of a job; another seed in every process but the first, whose weights are to count."""
    rank = int(os.environ.get("RANK", "0"))
    vlm = (bird_resnet if job.get("resnet") else bird_vlm)(rank, torch.float64)
    return vlm, replace(CONFIG, **job.get("config", {}))


def gradients(job: dict) -> dict[str, torch.Tensor]:
    """The gradient of every weight after one backward pass over the first `n` birds."""
    vlm, config = make(job)
    processes = Processes(vlm, config.precision)
    with _trainable(vlm.model, config.freeze_text):
        trainer = make_trainer(DealObjective(vlm, BANK, config), processes)
        trainer.share_state()
        share, indices = processes.share(job["n"]), list(range(job["n"]))
        batch = Birdworld(n=job["n"], size=vlm.image_size[0]).batch(share.of(indices) if share else indices)
        terms = trainer.wrapped(*_inputs(trainer, batch, Birdworld.categories, 3, share))
        terms["total"].backward()
        found = {name: p.grad.clone() for name, p in vlm.model.named_parameters() if p.grad is not None}
    return found | {"total": processes.mean(terms["total"].detach().clone())}


def tune(job: dict) -> dict[str, torch.Tensor]:
    """The history and the weights of a fine-tuning, killed after step `fails_at` and resumed where that is said."""
    vlm, config = make(job)
    options = {"out_dir": job.get("out_dir"), "save_every": 2, "resume": job.get("resume", False)}
    rows = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = finetune(vlm, Birdworld(n=job["n"], size=vlm.image_size[0]), BANK, config, progress=False,
                         workers=job.get("workers", 0), callback=rows.append, **options)
    return dict(vlm.model.state_dict()) | {
        "history": torch.tensor(table.to_numpy(float)), "rows": torch.tensor(len(rows)),
        "warned": torch.tensor(sum("accelerate was launched" in str(w.message) for w in caught))}


def launch(jobs: dict[str, dict], folder: Path, processes: int = 2, **env: str) -> list[dict[str, dict]]:
    """Run named jobs one after another in several processes, which find each other as under `accelerate launch`.

    Returns:
        For each process: name of a job -> what it gives, or {error: nothing} with the error's text as the key.
    """
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_PORT": port,
              "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
              "PYTHONPATH": os.pathsep.join(sys.path), **env}
    running = [subprocess.Popen([sys.executable, __file__, str(folder / "jobs.json")], text=True,
                                stderr=subprocess.PIPE, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
               for rank in range(processes)]
    try:
        for process in running:
            _, error = process.communicate(timeout=300)
            assert process.returncode == 0, error[-3000:]
    finally:
        for process in running:
            process.kill()
    return [{name: load_file(folder / f"{name} {rank}.safetensors") for name in jobs} for rank in range(processes)]


def main(path: Path) -> None:
    torch.set_num_threads(1)
    for name, job in json.loads(path.read_text()).items():
        try:
            result = {"gradients": gradients, "tune": tune}[job["do"]](job)
        except OSError as error:
            result = {str(error): torch.zeros(())}
        file = path.with_name(f"{name} {os.environ['RANK']}.safetensors")
        save_file({key: value.contiguous() for key, value in result.items()}, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
