"""The fine-tuning loop."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dealkit.inputs import category_names
from dealkit.models.weights import weights_digest
from dealkit.training.captions import draw_captions
from dealkit.training.checkpoint import load_checkpoint, prepare_folder, save_checkpoint
from dealkit.training.config import DealConfig
from dealkit.training.log import check_tensorboard, start_tensorboard, tell, tidy, write_config, write_history
from dealkit.training.objective import DealObjective
from dealkit.training.precision import check_weights
from dealkit.training.processes import Processes
from dealkit.training.step import Trainer, make_trainer, take_step


def finetune(vlm, train_set, bank, config: DealConfig, out_dir: str | Path | None = None, resume: bool = False,
             save_every: int = 50, progress: bool = True, workers: int = 0,
             callback: Callable[[dict], object] | None = None, tensorboard: bool = False) -> pd.DataFrame:
    """Fine-tune a vision-language model in place with DEAL's objective.

    Order and captions of a step depend on (config.seed, step) alone, so a resumed run sees what it would have seen,
    and runs with other weights see the same images and captions: they are paired. (A data set that changes its images
    at random must do so from a seed of its own.) Batch normalisation and dropout stay in eval mode: a map is defined
    for one image, not for a batch.

    It runs on the device of the model. Launched as several processes (accelerate launch, notebook_launcher), each works
    on its share of every batch, on the device that the launcher gave it; the gradient is that of one process with the
    whole batch (with a swap it is not: a process finds donors in its own share). All processes return the same history
    and weights; the first one alone writes and shows.

    Args:
        vlm: a VLM; its weights change.
        train_set: items with image and label; `categories` names the labels.
        bank: ConceptBank with an entry for every category.
        config: DealConfig.
        out_dir: where to keep checkpoint.safetensors and history.csv (every `save_every` steps), and at the end
            model.safetensors and config.json; None keeps nothing.
        resume: go on with the run in `out_dir`; on a CPU the result is bit-identical to an uninterrupted run.
        save_every: steps between checkpoints.
        progress: show a progress bar.
        workers: processes that load images beside each training process.
        callback: called after every step, in the first process, with the step's row of the history as a dict.
        tensorboard: write the history to out_dir/tensorboard, too.

    Returns:
        One row a step: step, epoch, contrastive, disentangle, localize, guard, total (the weighted sum), dead_maps;
        with limits also lambda_disentangle and gamma_localize, the weights that the step used;
        with float16 also skipped: 1 where the gradients overflowed and the weights stayed as they were.

    Warns:
        UserWarning: some categories have more concepts than others; the regularisers use as many as all of them have.
            resume=True where nothing was saved yet: the run starts from its beginning; or where the run was begun with
            other weights: it goes on from its own.

    Raises:
        KeyError: a category is missing from the bank.
        TypeError: a training set without `categories`.
        ValueError: an empty training set; resume without out_dir, or with another config, set or bank; an image
            without a category; a single concept; weights in half precision; checkpoint_activations or a precision that
            this model or device does not have; tensorboard without out_dir.
        FloatingPointError: a term or a gradient became NaN or infinite; names the step and the term.
        MemoryError (and RuntimeError): a step did not fit into the memory; names the batch size to try.
        PermissionError, FileExistsError: out_dir cannot be used. OSError: a checkpoint cannot be written.
        ImportError: tensorboard is not installed.
    """
    if resume and out_dir is None:
        raise ValueError("resume=True needs the out_dir of the run to go on with")
    if len(train_set) == 0:
        raise ValueError("the training set is empty; look at how it was loaded, or at the n it was made with")
    # a category missing from the bank raises with its remedy, before any work
    names = category_names(train_set)
    concepts = {category: bank[category] for category in names}
    settings = asdict(config) | {"images": len(train_set), "concepts": concepts}
    check_weights(vlm, config.precision)
    if tensorboard:
        check_tensorboard(out_dir)
    processes = Processes(vlm, config.precision)
    folder = processes.from_main(lambda: prepare_folder(out_dir, resume)) if out_dir is not None else None
    if folder:
        settings["start"] = weights_digest(vlm.model)
    objective = DealObjective(vlm, bank, config)
    vlm.model.eval()
    with _trainable(vlm.model, config.freeze_text):
        trainer = make_trainer(objective, processes)
        done, history = processes.from_main(lambda: load_checkpoint(folder, vlm.model, trainer.optimizer, settings,
                                                                    trainer.scaler)) if resume else (0, [])
        for row in history:                                      # the multipliers are where they were
            objective.multipliers.update(dict(zip(trainer.columns, row)))
        trainer.share_state()
        table = _run(trainer, train_set, names, settings, folder, done, history, save_every, workers,
                     progress and processes.is_main, callback, tensorboard)
    if folder:
        processes.from_main(partial(_finish, vlm, folder, table, config))
    return table


def _run(trainer: Trainer, train_set, names, settings, folder, done, history, save_every, workers, progress, callback,
         tensorboard) -> pd.DataFrame:
    """The steps from number `done` on -> the history of all."""
    config, processes, device = trainer.config, trainer.processes, trainer.objective.vlm.device
    batches = _batches(len(train_set), config)
    shares = [processes.share(len(batch)) for batch in batches]
    mine = [batch if share is None else share.of(batch) for batch, share in zip(batches, shares)]
    loader = DataLoader(train_set, batch_sampler=mine[done:], num_workers=workers, pin_memory=device.type == "cuda")
    main = processes.is_main
    writer = start_tensorboard(folder, done) if tensorboard and main else None
    bar = tqdm(loader, initial=done, total=len(batches), desc="fine-tuning", disable=not progress, leave=False)
    try:
        for step, batch in enumerate(bar, start=done):
            weights = trainer.objective.multipliers.record()
            values = take_step(trainer, step, *_inputs(trainer, batch, names, step, shares[step])) | weights
            trainer.objective.multipliers.update(values)
            history.append([values[name] for name in trainer.columns])
            bar.set_postfix(contrastive=f"{values['contrastive']:.2f}", disentangle=f"{values['disentangle']:.2f}")
            if folder and ((step + 1) % save_every == 0 or step + 1 == len(batches)):
                processes.from_main(partial(_save, trainer, folder, step + 1, history, settings))
            if main:
                epoch = step // math.ceil(len(train_set) / config.batch_size)
                tell({"step": step, "epoch": epoch, **values}, callback, writer)
    finally:
        if writer is not None:
            writer.close()
    return tidy(history, trainer.columns, len(train_set), config)


def _save(trainer: Trainer, folder: Path, step: int, history: list[list[float]], settings: dict) -> None:
    save_checkpoint(folder, step, trainer.objective.vlm.model, trainer.optimizer, history, settings, trainer.scaler)
    write_history(folder, tidy(history, trainer.columns, settings["images"], trainer.config))


def _finish(vlm, folder: Path, table: pd.DataFrame, config: DealConfig) -> None:
    vlm.save(folder / "model.safetensors")
    write_history(folder, table)
    write_config(folder, config)


@contextmanager
def _trainable(model: torch.nn.Module, freeze_text: bool) -> Iterator[None]:
    """Freeze the text tower inside, where that is asked for; leave no flag and no gradient behind."""
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        if freeze_text:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith(("visual.", "logit_")) and before[name])
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None


def _batches(n: int, config: DealConfig) -> list[list[int]]:
    """The images of every step: each epoch a new permutation; the last batch of an epoch may be smaller."""
    generator = torch.Generator().manual_seed(config.seed)
    return [chunk.tolist() for _ in range(config.epochs)
            for chunk in torch.randperm(n, generator=generator).split(config.batch_size)]


def _inputs(trainer: Trainer, batch: dict, names: list[str], step: int, share) -> tuple:
    """What the objective takes. Captions are drawn for the whole batch in every process: they depend on the step."""
    config, objective, device = trainer.config, trainer.objective, trainer.objective.vlm.device
    labels = trainer.processes.all_labels(batch["label"], share, device).tolist()
    if min(labels) < 0:
        raise ValueError("the training set holds images of no category (label -1); finetune needs a category for each")
    categories = [names[y] for y in labels]
    captions, true = draw_captions(categories, objective.bank, config, np.random.default_rng([config.seed, step]))
    if share is not None:
        categories, captions = share.of(categories), share.of(captions)
    images = objective.swapped(batch["image"].to(device, non_blocking=True), categories,
                               [config.seed, step, 0 if share is None else share.rank, 1])
    return images, categories, captions, true.to(device), share
