"""How much a model relies on the background, in a world where the background can be exchanged and nothing else."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from dealkit import metrics
from dealkit.evaluation.columns import Explainer
from dealkit.evaluation.embeddings import labels_of, loader
from dealkit.evaluation.passes import embed_and_explain
from dealkit.maps import explain

BACKGROUND = ("flipped", "background_mass", "background_area", "twin_errors")


@torch.no_grad()
def background_table(vlm, birds, explainer: Explainer | None = None, category_prompt: str = "a photo of a {}",
                     batch_size: int = 128, progress: bool = False) -> pd.DataFrame:
    """What the background does to each image's prediction, and how much of the category's map lies on it.

    Args:
        vlm: the model. birds: a `Birdworld` (anything with `on_other_background()`, whose items have part_masks).
        explainer: as in `image_table`; None is `explain` with the tower's method.
        category_prompt: text of a category; use the one of training.
        batch_size: images at a time. progress: show a progress bar.

    Returns:
        One row an image: label, background, predicted, predicted_other (for the same bird on the other background),
        correct (0 or 1), flipped (1 where the two predictions differ), twin_error (1 where the prediction is the
        species' twin; NaN where it is right), background_mass (share of the mass of the category's map, up-sampled,
        outside all part masks; NaN for a map without mass) and background_area (that of a map that is the same
        everywhere).

    Raises:
        TypeError: a data set without counterfactuals. ValueError: birds of no species.
    """
    if not hasattr(birds, "on_other_background"):
        raise TypeError(f"{type(birds).__name__} has no on_other_background(), so no bird can be seen on another "
                        "background; this needs Birdworld.")
    if labels_of(birds).min() < 0:
        raise ValueError("the data set holds birds of no category (label -1); make it with random_birds=0")
    prompts = [category_prompt.format(category) for category in birds.categories]
    names = vlm.encode_text(prompts)
    explainer = partial(explain) if explainer is None else explainer
    tables = []
    for batch, other in zip(tqdm(loader(vlm, birds, batch_size, 0), desc="backgrounds", disable=not progress,
                                 leave=False), loader(vlm, birds.on_other_background(), batch_size, 0)):
        label, images = batch["label"], batch["image"].to(vlm.device)
        image_emb, maps = embed_and_explain(vlm, images, names[label.to(names.device), None], explainer)
        predicted = (image_emb @ names.T).argmax(1).cpu()
        predicted_other = (vlm.encode_image(other["image"].to(vlm.device)) @ names.T).argmax(1).cpu()
        correct = predicted == label
        bird = batch["part_masks"].any(dim=1)
        tables.append(pd.DataFrame({
            "label": label, "background": batch["background"], "predicted": predicted,
            "predicted_other": predicted_other, "correct": correct.float(),
            "flipped": (predicted != predicted_other).float(),
            "twin_error": torch.where(correct, torch.nan, (predicted == label + 1 - 2 * (label % 2)).float()),
            "background_mass": mass_outside(maps[:, 0].cpu(), bird),
            "background_area": (~bird).float().mean(dim=(1, 2)),
        }))
    return pd.concat(tables, ignore_index=True)


def mass_outside(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of each map's mass outside a mask: maps `[B, h, w]`, masks `[B, H, W]` bool -> `[B]`, NaN without mass."""
    full = F.interpolate(maps[:, None].float(), size=masks.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    total = full.sum(dim=(1, 2))
    return torch.where(total > 0, (full * ~masks).sum(dim=(1, 2)) / total, torch.nan)


def background_reliance(vlm, birds, **options) -> pd.Series:
    """`background_table` as one row, each figure with its 95 % bootstrap interval over images.

    Returns:
        flipped: share of birds whose prediction changes with the background alone. background_mass and background_area:
        means. twin_errors: of the wrong predictions, the share that names the twin. Each with _low and _high. Then
        "accuracy/<species>/<background>", the cells behind the worst group.
    """
    table = background_table(vlm, birds, **options)
    row = {}
    for name in BACKGROUND:
        values = table["twin_error" if name == "twin_errors" else name].to_numpy(float)
        row[name] = np.nanmean(values) if not np.isnan(values).all() else np.nan
        row[f"{name}_low"], row[f"{name}_high"] = metrics.bootstrap_interval(values)
    for (label, ground), cell in table.groupby(["label", "background"]):
        row[f"accuracy/{birds.categories[label]}/{('land', 'water')[ground]}"] = cell["correct"].mean()
    return pd.Series(row)
