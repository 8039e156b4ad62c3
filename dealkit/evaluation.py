"""One model, one data set, one bank -> one tidy row. Also the rows per image, per part and per concept behind it."""
from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from dealkit import metrics
from dealkit.maps import cosines, explain

Explainer = Callable[..., Tensor]        # (vlm, images [B,3,H,W], text embeddings [B,K,D]) -> maps [B,K,h,w]
MAP_METRICS = ("overlap_cosine", "overlap_product", "insertion_fidelity", "insertion_auc", "deletion_auc",
               "pointing_game", "mass_in_mask", "iou", "dead_maps")


def random_maps(vlm, images: Tensor, text_emb: Tensor) -> Tensor:
    """Control: maps of noise. The seed is a checksum of the image, so that they do not depend on the batch."""
    seeds = [zlib.crc32(image.numpy().tobytes()) for image in images.detach().float().cpu()]
    return torch.stack([torch.rand(text_emb.shape[1], *vlm.grid, generator=torch.Generator().manual_seed(seed))
                        for seed in seeds]).to(images)


def centre_maps(vlm, images: Tensor, text_emb: Tensor) -> Tensor:
    """Control: the same bump in the middle of the image for every concept."""
    h, w = vlm.grid
    y, x = torch.linspace(-1, 1, h)[:, None], torch.linspace(-1, 1, w)
    return torch.exp(-4 * (x ** 2 + y ** 2)).expand(len(images), text_emb.shape[1], h, w).to(images)


def image_table(vlm, dataset, bank, explainer: Explainer | None = None, category_prompt: str = "a photo of a {}",
                batch_size: int = 128, insertion_images: int = 64, masks: bool = True,
                progress: bool = False) -> pd.DataFrame:
    """Every metric for every image. The maps are those of the concepts of the image's own category.

    Args:
        vlm: the model. dataset: items with image and label (see the design of `Birdworld`). bank: ConceptBank.
        explainer: (vlm, images, embeddings [B, K, D]) -> maps [B, K, h, w]; None is `explain` with the tower's method.
            `random_maps` and `centre_maps` are controls.
        category_prompt: text of a category; use the one of training.
        batch_size: images at a time.
        insertion_images: how many images, evenly spread, get the insertion and deletion metrics (each costs about
            25 forward passes a concept); 0 leaves them NaN.
        masks: False leaves out every metric that needs part masks, as one must when choosing settings.
        progress: show a progress bar.

    Returns:
        One row an image: label, group, correct, concept_correct (mean over its parts), the metrics of MAP_METRICS
        (mean over its concepts), and `<metric>/<part>` for pointing_game, mass_in_mask and iou. NaN where undefined.

    Raises:
        KeyError: a category is missing from the bank.
        ValueError: an image of no category (label -1).
    """
    if len(dataset) == 0:
        raise ValueError("the data set is empty; look at how it was loaded, or at the n it was made with")
    explainer = explainer or partial(explain)
    names = dataset.categories
    concepts = {c: bank[c] for c in names}
    k = min(len(v) for v in concepts.values())
    with torch.no_grad():
        category_emb = vlm.encode_text([category_prompt.format(c) for c in names])
        concept_emb = torch.stack([vlm.encode_text(concepts[c][:k]) for c in names])        # [categories, K, D]
        options = [vlm.encode_text(texts) for texts in getattr(dataset, "concept_options", [])]
    probed = set(np.linspace(0, len(dataset) - 1, min(insertion_images, len(dataset))).round().astype(int).tolist())
    tables, first = [], 0
    for batch in tqdm(DataLoader(dataset, batch_size), desc="evaluating", disable=not progress, leave=False):
        images, labels = batch["image"].to(vlm.device), batch["label"]
        if labels.min() < 0:
            raise ValueError("the data set holds images of no category (label -1); evaluation needs one for each image")
        emb = concept_emb[labels]
        with torch.no_grad():
            image_emb = vlm.encode_image(images)
        columns = {"label": labels, "group": batch.get("group", torch.full_like(labels, -1)),
                   "correct": ((image_emb @ category_emb.T).argmax(1).cpu() == labels).float()}
        if options and "attributes" in batch:
            answers = torch.stack([(image_emb @ option.T).argmax(1).cpu() for option in options], dim=1)
            columns["concept_correct"] = (answers == batch["attributes"]).float().mean(1)
        maps = explainer(vlm, images, emb).detach()
        if k > 1:                                                        # one map alone overlaps with nothing: NaN
            columns["overlap_cosine"] = metrics.overlap(maps, "cosine", reduction="none")
            columns["overlap_product"] = metrics.overlap(maps, "product", reduction="none")
        columns["dead_maps"] = metrics.dead_maps(maps, reduction="none").float()
        if masks and "part_masks" in batch:
            part_of = [[_part_of(c, dataset.parts) for c in concepts[name][:k]] for name in names]
            columns |= _localization(maps.cpu(), batch["part_masks"], labels, part_of, dataset.parts)
        chosen = [i for i in range(len(labels)) if first + i in probed]
        if chosen:
            columns |= _faithfulness(vlm, images, emb, maps, chosen)
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
        mass_in_mask, iou, dead_maps, each followed by <name>_low and <name>_high; then n, the number of images.
        NaN where undefined.

    Raises:
        KeyError: a category is missing from the bank.
        ValueError: an image of no category (label -1).
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
            score = lambda overlap: float(1 / (1 + np.exp(-10 * (0.2 - overlap / 100))))  # noqa: E731
            add("disentanglability", score(row[name]), (score(row[f"{name}_high"]), score(row[f"{name}_low"])))
    row["n"] = len(table)
    return pd.Series(row)


def part_table(table: pd.DataFrame) -> pd.DataFrame:
    """The localization of each part from a table per image -> rows metric, columns part, means over images."""
    columns = [c for c in table.columns if "/" in c]
    means = table[columns].mean()
    means.index = pd.MultiIndex.from_tuples([tuple(c.split("/")) for c in columns], names=["metric", "part"])
    return means.unstack("part")[list(dict.fromkeys(means.index.get_level_values("part")))]


def embed_images(vlm, dataset, n: int = 320, batch_size: int = 128) -> tuple[Tensor, Tensor]:
    """Embeddings and labels of n images, evenly spread over the data set -> ([n, D] unit norm, [n]), on the CPU."""
    chosen = np.linspace(0, len(dataset) - 1, min(n, len(dataset))).round().astype(int).tolist()
    with torch.no_grad():
        batches = [(vlm.encode_image(batch["image"].to(vlm.device)).cpu(), batch["label"])
                   for batch in DataLoader(Subset(dataset, chosen), batch_size)]
    return torch.cat([emb for emb, _ in batches]), torch.cat([labels for _, labels in batches])


def concept_table(vlm, embedded: tuple[Tensor, Tensor], categories: list[str], bank) -> pd.DataFrame:
    """How similar is each concept to images of its own category and to images of the others?

    Args:
        vlm: the model that reads the concepts.
        embedded: image embeddings [N, D] and labels [N], from `embed_images`.
        categories: names of the labels; those that the bank lacks are left out (all of them: an error).
        bank: mapping from category to concepts.

    Returns:
        One row a category and concept: category, concept, own and others (mean cosines), and auc, the probability that
        an image of the category has a higher cosine than an image of another one (the area under the ROC curve, from
        the rank sum; ties count half). 0.5 is a concept that tells nothing, below it the concept misleads. NaN where
        there are no images of the category or no others.

    Raises:
        ValueError: the bank has none of the categories.
    """
    if not any(category in bank for category in categories):
        raise ValueError(f"the bank has none of the categories {', '.join(map(repr, categories[:3]))} ...; use the "
                         "bank that was made for this data set")
    image_emb, labels = embedded
    rows = []
    for label, category in enumerate(categories):
        if category not in bank:
            continue
        with torch.no_grad():
            scores = (image_emb @ vlm.encode_text(bank[category]).cpu().T).double().numpy()       # [N, K]
        own = (labels == label).numpy()
        n, rest = own.sum(), (~own).sum()
        auc = (rankdata(scores, axis=0)[own].sum(0) - n * (n + 1) / 2) / (n * rest) if n and rest else None
        for k, concept in enumerate(bank[category]):
            rows.append((category, concept, scores[own, k].mean() if n else np.nan,
                         scores[~own, k].mean() if rest else np.nan, np.nan if auc is None else auc[k]))
    return pd.DataFrame(rows, columns=["category", "concept", "own", "others", "auc"])


def _localization(maps, part_masks, labels, part_of, parts) -> dict[str, Tensor]:
    """Metrics against masks, mean over the concepts that name a part and, separately, for each part."""
    index = torch.tensor(part_of)[labels]                                   # [B, K], -1 where a concept names no part
    chosen = part_masks.gather(1, index.clamp(min=0)[..., None, None].expand(-1, -1, *part_masks.shape[2:]))
    columns = {}
    for name in ("pointing_game", "mass_in_mask", "iou"):
        values = getattr(metrics, name)(maps, chosen, reduction="none").double()
        values = values.masked_fill(index < 0, torch.nan)
        columns[name] = values
        for p, part in enumerate(parts):
            columns[f"{name}/{part}"] = values.masked_fill(index != p, torch.nan)
    return columns


def _faithfulness(vlm, images, emb, maps, chosen) -> dict[str, Tensor]:
    images, emb, picked = images[chosen], emb[chosen], maps[chosen]
    score = lambda x, k: cosines(vlm.encode_image(x), emb[:, k:k + 1])[:, 0]  # noqa: E731
    columns = {}
    for name in ("insertion_fidelity", "insertion_auc", "deletion_auc"):
        values = torch.full(maps.shape[:2], torch.nan, dtype=torch.float64)
        values[chosen] = getattr(metrics, name)(score, images, picked, reduction="none").double().cpu()
        columns[name] = values
    return columns


def _part_of(concept: str, parts: list[str]) -> int:
    """Which mask a concept names: the first part whose name is one of its words; -1 for none."""
    words = concept.lower().split()
    return next((i for i, part in enumerate(parts) if part in words), -1)


def _per_image(values: Tensor) -> np.ndarray:
    values = values.detach().cpu()
    return (values.double().nanmean(1) if values.ndim == 2 else values).numpy()
