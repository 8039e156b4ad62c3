"""One model, one data set, one bank -> one tidy row. Also the rows per image and per part behind it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dealkit import metrics
from dealkit.evaluation import columns as made
from dealkit.inputs import category_names, concept_lists
from dealkit.maps import explain

MAP_METRICS = ("overlap_cosine", "overlap_product", "insertion_fidelity", "insertion_auc", "deletion_auc",
               "pointing_game", "mass_in_mask", "iou", "dead_maps", "insertion_auc_mean", "deletion_auc_mean",
               "best_iou", "point_hits", "point_mass", "infidelity", "max_sensitivity")


def image_table(vlm, dataset, bank, explainer: made.Explainer | None = None, category_prompt: str = "a photo of a {}",
                batch_size: int = 128, insertion_images: int = 64, masks: bool = True, progress: bool = False,
                perturbed_images: int | None = None, point_radius: float = 0.1,
                explained: Mapping[str, list[str]] | None = None) -> pd.DataFrame:
    """Every metric for every image. The maps are those of the concepts of the image's own category.

    Args:
        vlm: the model. dataset: items with image and label (see the design of `Birdworld`). bank: ConceptBank.
        explainer: (vlm, images, embeddings [B, K, D]) -> maps [B, K, h, w]; None is `explain` with the tower's method.
            `random_maps`, `centre_maps` and `uniform_maps` are controls.
        category_prompt: text of a category; use the one of training.
        batch_size: images at a time.
        insertion_images: how many images, evenly spread, get the insertion and deletion metrics (each costs 40
            forward passes a concept, and 8 more); 0 leaves them NaN.
        masks: False leaves out every metric that needs part masks or points, as one must when choosing settings.
        progress: show a progress bar.
        perturbed_images: how many images, evenly spread, get infidelity and max-sensitivity (each costs 17 forward
            passes and 9 explanations, for all concepts together); 0 leaves them NaN, None is half of
            `insertion_images`.
        point_radius: of the discs around `part_points`, as a share of the image's longer side.
        explained: concepts whose maps are made instead of the category's own and held against the masks of these,
            first against first and so on; a control, see `dealkit.controls.wrong_concepts`.

    Returns:
        One row an image: label, group, correct, concept_correct (mean over its parts), the metrics of MAP_METRICS
        (mean over its concepts), and `<metric>/<part>` for those against masks or points. NaN where undefined.

    Raises:
        KeyError: a category is missing from the bank.
        TypeError: a data set without `categories`, or with masks or points of parts but without `parts`.
        ValueError: an empty data set; an image of no category (label -1); not one mask or point for each part;
            an explainer's maps of another shape; `explained` with fewer concepts than the bank; no concepts at all.

    Warns:
        UserWarning: some categories have more concepts than others; only as many as all of them have are used.
    """
    if len(dataset) == 0:
        raise ValueError("the data set is empty; look at how it was loaded, or at the n it was made with")
    explainer = explainer or explain
    names = category_names(dataset)
    concepts, k = concept_lists(bank, names)
    asked = concepts if explained is None else {c: list(explained[c])[:k] for c in names}
    short = [c for c in names if len(asked[c]) < k]
    if short:
        raise ValueError(f"explained has fewer than {k} concepts for {short[0]!r}; expected as many as in the bank")
    with torch.no_grad():
        category_emb = vlm.encode_text([category_prompt.format(c) for c in names])
        concept_emb = torch.stack([vlm.encode_text(asked[c]) for c in names])               # [categories, K, D]
        options = [vlm.encode_text(texts) for texts in getattr(dataset, "concept_options", [])]
    perturbed_images = insertion_images // 2 if perturbed_images is None else perturbed_images
    inserted, perturbed = (set(made.evenly_spread(n, len(dataset))) for n in (insertion_images, perturbed_images))
    tables, first = [], 0
    for batch in tqdm(DataLoader(dataset, batch_size), desc="evaluating", disable=not progress, leave=False):
        images, labels = batch["image"].to(vlm.device), batch["label"]
        if labels.min() < 0:
            raise ValueError("the data set holds images of no category (label -1); evaluation needs one for each image")
        emb = concept_emb[labels]
        with torch.no_grad():
            columns = made.predictions(vlm.encode_image(images), category_emb, options, batch)
        maps = made.checked_maps(explainer(vlm, images, emb), emb)
        columns |= made.entanglement(maps)
        if masks:
            columns |= made.localization(maps, batch, dataset, list(concepts.values()), point_radius)
        for picked, make in ((inserted, made.faithfulness), (perturbed, partial(made.stability, explainer=explainer))):
            chosen = [i for i in range(len(labels)) if first + i in picked]
            if chosen:
                columns |= made.of_some(make(vlm, images[chosen], emb[chosen], maps[chosen]), chosen, len(labels))
        first += len(labels)
        tables.append(pd.DataFrame({name: _per_image(value) for name, value in columns.items()}))
    table = pd.concat(tables, ignore_index=True)
    return table.reindex(columns=[*table.columns, *(c for c in ("concept_correct", *MAP_METRICS) if c not in table)])


def evaluate(vlm, dataset, bank, **options) -> pd.Series:
    """One model on one data set with one bank: every metric with its 95 % bootstrap interval over images.

    Args:
        vlm, dataset, bank, options: as `image_table`.

    Returns:
        accuracy, concept_accuracy (colour given part in Birdworld), worst_group_accuracy, overlap_cosine,
        overlap_product, disentanglability, insertion_fidelity, insertion_auc, deletion_auc, pointing_game,
        mass_in_mask, iou, dead_maps; then insertion_auc_mean and deletion_auc_mean (the mean colour as baseline),
        best_iou, point_hits and point_mass (data sets with `part_points`), infidelity and max_sensitivity; each
        followed by <name>_low and <name>_high; then n, the number of images. NaN where undefined.

    Raises, warns: as `image_table`.
    """
    return summarise(image_table(vlm, dataset, bank, **options))


def summarise(table: pd.DataFrame) -> pd.Series:
    """The row of `evaluate` from a table per image."""
    row = {}

    def add(name, value, interval):
        row[name], row[f"{name}_low"], row[f"{name}_high"] = value, *interval

    for name, column in (("accuracy", "correct"), ("concept_accuracy", "concept_correct")):
        add(name, table[column].mean(), metrics.bootstrap_interval(table[column].to_numpy(float)))
    groups = table.loc[table["group"] >= 0, ["correct", "group"]].to_numpy(float)
    worst = lambda rows: metrics.worst_group_accuracy(rows[:, 0], rows[:, 1])  # noqa: E731
    add("worst_group_accuracy", *((worst(groups), metrics.bootstrap_interval(groups, worst))
                                  if len(groups) else (np.nan, (np.nan, np.nan))))
    for name in MAP_METRICS:
        values = table[name].to_numpy(float)
        add(name, np.nanmean(values) if not np.isnan(values).all() else np.nan, metrics.bootstrap_interval(values))
        if name == "overlap_product":       # the paper's score falls with the overlap, so its interval turns round
            score = [float(metrics.disentanglability_of(row[f"{name}{end}"])) for end in ("", "_high", "_low")]
            add("disentanglability", score[0], score[1:])
    row["n"] = len(table)
    return pd.Series(row)


def part_table(table: pd.DataFrame) -> pd.DataFrame:
    """The localization of each part from a table per image -> rows metric, columns part, means over images."""
    columns = [c for c in table.columns if "/" in c]
    means = table[columns].mean()
    means.index = pd.MultiIndex.from_tuples([tuple(c.split("/", 1)) for c in columns], names=["metric", "part"])
    return means.unstack("part")[list(dict.fromkeys(means.index.get_level_values("part")))]


def _per_image(values: Tensor) -> np.ndarray:
    values = values.detach().cpu()
    values = values.double() if values.is_floating_point() else values          # numpy has no bfloat16
    return (values.nanmean(1) if values.ndim == 2 else values).numpy()
