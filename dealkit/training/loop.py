"""The fine-tuning loop."""
from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dealkit.inputs import category_names
from dealkit.training.checkpoint import load_checkpoint, prepare_folder, save_checkpoint, write_text
from dealkit.training.config import DealConfig
from dealkit.training.objective import TERMS, DealObjective


def finetune(vlm, train_set, bank, config: DealConfig, out_dir: str | Path | None = None, resume: bool = False,
             save_every: int = 50, progress: bool = True) -> pd.DataFrame:
    """Fine-tune a vision-language model in place with DEAL's objective.

    Order and captions of a step depend on (config.seed, step) alone, so a resumed run sees what it would have seen,
    and runs with other weights see the same images and captions: they are paired. Batch normalisation and dropout stay
    in eval mode: a map is defined for one image, not for a batch.

    Args:
        vlm: a VLM; its weights change.
        train_set: items with image and label; `categories` names the labels.
        bank: ConceptBank with an entry for every category.
        config: DealConfig.
        out_dir: where to keep checkpoint.safetensors (every `save_every` steps), model.safetensors, history.csv and
            config.json; None keeps nothing.
        resume: go on with the run in `out_dir`; on a CPU the result is bit-identical to an uninterrupted run.
        save_every: steps between checkpoints.
        progress: show a progress bar.

    Returns:
        One row a step: step, epoch, contrastive, disentangle, localize, guard, total (the weighted sum), dead_maps.

    Warns:
        UserWarning: some categories have more concepts than others; the regularisers use as many as all of them have.

    Raises:
        KeyError: a category is missing from the bank.
        TypeError: a training set without `categories`.
        ValueError: an empty training set; resume without out_dir, or with another config, set or bank; an image
            without a category; a single concept.
        FloatingPointError: a term or a gradient became NaN or infinite; names the step and the term.
        PermissionError, FileExistsError: out_dir cannot be used. OSError: a checkpoint cannot be written.
    """
    if resume and out_dir is None:
        raise ValueError("resume=True needs the out_dir of the run to go on with")
    if len(train_set) == 0:
        raise ValueError("the training set is empty; look at how it was loaded, or at the n it was made with")
    # a category missing from the bank raises with its remedy, before any work
    names = category_names(train_set)
    concepts = {category: bank[category] for category in names}
    settings = asdict(config) | {"images": len(train_set), "concepts": concepts}
    folder = prepare_folder(out_dir, resume) if out_dir is not None else None
    objective = DealObjective(vlm, bank, config)
    vlm.model.eval()
    was_trainable = {name: p.requires_grad for name, p in vlm.model.named_parameters()}
    try:
        if config.freeze_text:
            for name, parameter in vlm.model.named_parameters():
                parameter.requires_grad_(name.startswith(("visual.", "logit_")) and was_trainable[name])
        trained = [p for p in vlm.model.parameters() if p.requires_grad]
        # no fused or foreach variant: the plain loop gives the same bits on every run
        optimizer = torch.optim.Adam(trained, lr=config.lr, betas=config.betas, eps=config.eps,
                                     weight_decay=config.weight_decay, foreach=False)
        done, history = load_checkpoint(folder, vlm.model, optimizer, settings) if resume else (0, [])
        batches = _batches(len(train_set), config)
        loader = DataLoader(train_set, batch_sampler=batches[done:])
        bar = tqdm(loader, initial=done, total=len(batches), desc="fine-tuning", disable=not progress, leave=False)
        for step, batch in enumerate(bar, start=done):
            terms = _step(objective, optimizer, batch, names, step)
            history.append([terms[name] for name in TERMS])
            bar.set_postfix(contrastive=f"{terms['contrastive']:.2f}", disentangle=f"{terms['disentangle']:.2f}")
            if folder and ((step + 1) % save_every == 0 or step + 1 == len(batches)):
                save_checkpoint(folder, step + 1, vlm.model, optimizer, history, settings)
    finally:
        for name, parameter in vlm.model.named_parameters():
            parameter.requires_grad_(was_trainable[name])
            parameter.grad = None
    table = pd.DataFrame(history, columns=list(TERMS))
    table.insert(0, "step", range(len(table)))
    table.insert(1, "epoch", table.step // math.ceil(len(train_set) / config.batch_size))
    if folder:
        vlm.save(folder / "model.safetensors")
        write_text(folder / "history.csv", table.to_csv(index=False, lineterminator="\n"))
        write_text(folder / "config.json", json.dumps(asdict(config), indent=1) + "\n")
    return table


def _batches(n: int, config: DealConfig) -> list[list[int]]:
    """The images of every step: each epoch a new permutation; the last batch of an epoch may be smaller."""
    generator = torch.Generator().manual_seed(config.seed)
    return [chunk.tolist() for _ in range(config.epochs)
            for chunk in torch.randperm(n, generator=generator).split(config.batch_size)]


def _step(objective, optimizer, batch, names, step) -> dict[str, float]:
    config, vlm = objective.config, objective.vlm
    labels = batch["label"].tolist()
    if min(labels) < 0:
        raise ValueError("the training set holds images of no category (label -1); finetune needs a category for each")
    categories = [names[y] for y in labels]
    captions, true = draw_captions(categories, objective.bank, config, np.random.default_rng([config.seed, step]))
    terms = objective(batch["image"], categories, captions, true.to(vlm.device))
    values = {name: value.item() for name, value in terms.items()}
    broken = [f"the term {name!r} is {values[name]}" for name in TERMS if not math.isfinite(values[name])]
    if not broken:
        optimizer.zero_grad()
        terms["total"].backward()
        broken = [f"the gradient of {name!r} is not finite" for name, p in vlm.model.named_parameters()
                  if p.grad is not None and not p.grad.isfinite().all()]
    if broken:
        raise FloatingPointError(
            f"step {step}: {broken[0]}. Nothing was skipped: the weights are those before this step. Try a smaller lr "
            f"(now {config.lr:g}), float32 weights (now {vlm.dtype}), or look at the images of this step.")
    optimizer.step()
    with torch.no_grad():
        vlm.model.logit_scale.clamp_(max=math.log(100))      # CLIP's own bound
    return values


def draw_captions(categories: list[str], bank, config: DealConfig, rng) -> tuple[list[str], torch.Tensor]:
    """One true caption an image: its name, its name with concepts, or concepts alone (so that words are not forgotten).

    Returns:
        B captions, and a [B, B] bool matrix: is caption j true of image i (as far as the bank knows)? True pairs off
        the diagonal are no negatives.
    """
    captions, claims = [], []
    for category in categories:
        concepts = bank[category]
        some = [concepts[i] for i in rng.permutation(len(concepts))[:rng.integers(1, len(concepts) + 1)]]
        name = config.category_prompt.format(category)
        kind = rng.random()
        if kind >= config.concept_captions:
            captions.append(name)
            claims.append((category, ()))
        elif kind < config.concept_captions / 3:
            captions.append(f"{name} with {', '.join(some)}")
            claims.append((category, ()))
        else:
            captions.append(", ".join(some))
            claims.append((None, some))
    owned = [set(bank[c]) for c in categories]
    true = [[named in (None, c) and own.issuperset(some) for named, some in claims]
            for c, own in zip(categories, owned)]
    return captions, torch.tensor(true)
