"""One model, one data set, one bank -> one tidy row. Also the rows per image and per part behind it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dealkit import metrics
from dealkit.evaluation import columns as made
from dealkit.evaluation.embeddings import category_weights, loader, worst_group
from dealkit.evaluation.passes import embed_and_explain, stability
from dealkit.evaluation.ranks import caption_embeddings, check_labels, encode_texts, ranks, recalls
from dealkit.inputs import category_names, concept_lists

MAP_METRICS = ("overlap_cosine", "overlap_product", "insertion_fidelity", "insertion_auc", "deletion_auc",
               "pointing_game", "mass_in_mask", "iou", "dead_maps", "insertion_auc_mean", "deletion_auc_mean",
               "best_iou", "point_hits", "point_mass", "infidelity", "max_sensitivity")
RECALLS_AT = (1, 5)


def image_table(vlm, dataset, bank, explainer: made.Explainer | None = None, category_prompt: str = "a photo of a {}",
                batch_size: int = 128, insertion_images: int = 64, masks: bool = True, progress: bool = False,
                perturbed_images: int | None = None, point_radius: float = 0.1,
                explained: Mapping[str, list[str]] | None = None, workers: int = 0,
                embeddings: Tensor | None = None) -> pd.DataFrame:
    """Every metric for every image. The maps are those of the concepts of the image's own category.

    An image goes through the trunk once, for its names, its concepts and its maps; what insertion, deletion and
    perturbation cost comes on top.

    Args:
        vlm: the model. dataset: items with image and label (see the design of `Birdworld`). bank: ConceptBank.
        explainer: (vlm, images, embeddings [B, K, D]) -> maps [B, K, h, w]; None is `explain` with the tower's method.
            `random_maps`, `centre_maps` and `uniform_maps` are controls. One with a parameter `split` gets the cut
            tower of the same pass (of the kind that its attribute `kind` names, or the tower's first); one without
            makes passes of its own.
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
        workers: processes that load images; 0 loads them in this one.
        embeddings: of all images, `[N, D]`, where `embed` has made them already; then an explainer that does not need
            the trunk costs no pass at all.

    Returns:
        One row an image: label, group, correct, correct_by_concepts (the category whose concepts, without its name,
        have the highest mean cosine), concept_correct (mean over its parts), the metrics of MAP_METRICS (mean over its
        concepts), `<metric>/<part>` for those against masks or points, and caption_rank and image_rank, see
        `dealkit.evaluation.ranks`. NaN where undefined.

    Raises:
        KeyError: a category is missing from the bank.
        TypeError: a data set without `categories`, or with masks or points of parts but without `parts`.
        ValueError: an empty data set; an image of no category (label -1, or beyond the categories); not one mask or
            point for each part; an explainer's maps of another shape; `explained` with fewer concepts than the bank;
            no concepts at all; embeddings that are not finite, or not one for each image.

    Warns:
        UserWarning: some categories have more concepts than others; only as many as all of them have are used. A
            caption (category and concepts) is longer than the model's context; the concepts that fit are used.
    """
    if len(dataset) == 0:
        raise ValueError("the data set is empty; look at how it was loaded, or at the n it was made with")
    names = category_names(dataset)
    concepts, k = concept_lists(bank, names)
    asked = concepts if explained is None else {c: list(explained[c])[:k] for c in names}
    short = [c for c in names if len(asked[c]) < k]
    if short:
        raise ValueError(f"explained has fewer than {k} concepts for {short[0]!r}; expected as many as in the bank")
    if embeddings is not None and (embeddings.ndim != 2 or len(embeddings) != len(dataset)):
        raise ValueError(f"embeddings have shape {tuple(embeddings.shape)}; expected [{len(dataset)}, D], one for each "
                         "image, from dealkit.evaluation.embed")
    with torch.no_grad():
        own_emb = torch.stack([vlm.encode_text(concepts[c]) for c in names])                # [categories, K, D]
        concept_emb = own_emb if explained is None else torch.stack([vlm.encode_text(asked[c]) for c in names])
        texts = {"category": encode_texts(vlm, [category_prompt.format(c) for c in names]),
                 "concepts": category_weights(own_emb),
                 "options": [vlm.encode_text(texts) for texts in getattr(dataset, "concept_options", [])]}
    caption_emb = caption_embeddings(vlm, concepts, category_prompt)
    perturbed_images = insertion_images // 2 if perturbed_images is None else perturbed_images
    inserted, perturbed = (set(made.evenly_spread(n, len(dataset))) for n in (insertion_images, perturbed_images))
    tables, seen, first = [], [], 0
    for batch in tqdm(loader(vlm, dataset, batch_size, workers), desc="evaluating", disable=not progress, leave=False):
        images, labels = batch["image"].to(vlm.device, non_blocking=True), batch["label"]
        if labels.min() < 0:
            raise ValueError("the data set holds images of no category (label -1); evaluation needs one for each image")
        emb = concept_emb[check_labels(labels, len(images), len(names)).to(concept_emb.device)]
        image_emb, maps = embed_and_explain(vlm, images, emb, explainer, embedding=embeddings is None)
        if image_emb is None:
            image_emb = embeddings[first:first + len(images)].to(emb)
        columns = made.predictions(image_emb, texts, batch)
        columns |= made.entanglement(maps)
        if masks:
            columns |= made.localization(maps, batch, dataset, list(concepts.values()), point_radius)
        for picked, make in ((inserted, made.faithfulness), (perturbed, stability)):
            chosen = [i for i in range(len(labels)) if first + i in picked]
            if chosen:
                columns |= made.of_some(make(vlm, images[chosen], emb[chosen], maps[chosen], explainer), chosen,
                                        len(labels))
        first += len(labels)
        seen.append(image_emb.cpu())
        tables.append(pd.DataFrame({name: _per_image(value) for name, value in columns.items()}))
    table = pd.concat(tables, ignore_index=True)
    places = ranks(torch.cat(seen), caption_emb, torch.tensor(table["label"].to_numpy()))
    table = table.assign(**{name: place.numpy() for name, place in places.items()})
    return table.reindex(columns=[*table.columns, *(c for c in ("concept_correct", *MAP_METRICS) if c not in table)])


def evaluate(vlm, dataset, bank, **options) -> pd.Series:
    """One model on one data set with one bank: every metric with its 95 % bootstrap interval over images.

    Args:
        vlm, dataset, bank, options: as `image_table`.

    Returns:
        accuracy, concept_accuracy (colour given part in Birdworld), worst_group_accuracy, overlap_cosine,
        overlap_product, disentanglability, insertion_fidelity, insertion_auc, deletion_auc, pointing_game,
        mass_in_mask, iou, dead_maps; then insertion_auc_mean and deletion_auc_mean (the mean colour as baseline),
        best_iou, point_hits and point_mass (data sets with `part_points`), infidelity and max_sensitivity; then
        accuracy_by_concepts (zero-shot by the mean cosine with a category's concepts, after Menon and Vondrick, ICLR
        2023, who also put the category's name before each), image_to_text_recall_1, image_to_text_recall_5,
        text_to_image_recall_1 and text_to_image_recall_5 (one caption a category, its prompt with its concepts; see
        `retrieval`; with five categories or fewer, every image finds its caption among the first five); each followed
        by <name>_low and <name>_high; then n, the number of images. NaN where undefined.

    Raises, warns: as `image_table`.
    """
    return summarise(image_table(vlm, dataset, bank, **options))


def summarise(table: pd.DataFrame) -> pd.Series:
    """The row of `evaluate` from a table per image. A table without the columns of retrieval has NaN for them."""
    row = {}

    def add(name, value, interval):
        row[name], row[f"{name}_low"], row[f"{name}_high"] = value, *interval

    for name, column in (("accuracy", "correct"), ("concept_accuracy", "concept_correct")):
        add(name, table[column].mean(), metrics.bootstrap_interval(table[column].to_numpy(float)))
    row |= worst_group(table["correct"].to_numpy(float), table["group"].to_numpy())
    for name in MAP_METRICS:
        values = table[name].to_numpy(float)
        add(name, np.nanmean(values) if not np.isnan(values).all() else np.nan, metrics.bootstrap_interval(values))
        if name == "overlap_product":       # the paper's score falls with the overlap, so its interval turns round
            score = [float(metrics.disentanglability_of(row[f"{name}{end}"])) for end in ("", "_high", "_low")]
            add("disentanglability", score[0], score[1:])
    by_concepts = table.get("correct_by_concepts", pd.Series(np.nan, table.index)).to_numpy(float)
    add("accuracy_by_concepts", by_concepts.mean(), metrics.bootstrap_interval(by_concepts))
    row |= recalls(table, RECALLS_AT)
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
