"""The columns of a table per image: one value per image and concept, `[B, K]`, NaN where undefined."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dealkit import metrics
from dealkit.inputs import part_names
from dealkit.maps import cosines
from dealkit.normalize import at_least_float32

Explainer = Callable[..., Tensor]        # (vlm, images [B,3,H,W], text embeddings [B,K,D]) -> maps [B,K,h,w]
MASK_METRICS = {"pointing_game": metrics.pointing_game, "mass_in_mask": metrics.mass_in_mask, "iou": metrics.iou,
                "best_iou": metrics.best_iou}
# CUB's parts say beak, and 143 concepts of its bank say bill
ALSO_CALLED = {"beak": ("bill",), "breast": ("chest",), "belly": ("abdomen",)}
POINT_METRICS = {"point_hits": metrics.pointing_game, "point_mass": metrics.mass_in_mask}       # on discs


def evenly_spread(n: int, size: int) -> list[int]:
    """n of the numbers 0 .. size - 1, the first and the last among them; all where there are fewer."""
    return np.linspace(0, size - 1, min(n, size)).round().astype(int).tolist()


def named_parts(concepts: list[list[str]], parts: list[str]) -> Tensor:
    """Which parts a concept names: lists of K concepts -> `[lists, K, P]` bool.

    A part is named by its last word, in the singular or with an s: "yellow legs" names "left leg" and "right leg"; or
    by a word that means the same (ALSO_CALLED): "hooked bill" names "beak".
    """
    names = [[f"{word}{s}" for word in (last, *ALSO_CALLED.get(last, ())) for s in ("", "s")]
             for last in (part.lower().split()[-1] for part in parts)]
    return torch.tensor([[[not said.isdisjoint(words) for words in names]
                          for said in (set(concept.lower().split()) for concept in row)] for row in concepts])


def checked_maps(maps: Tensor, emb: Tensor) -> Tensor:
    """An explainer's maps on the device of the embeddings `[B, K, D]`; ValueError unless there is one for each."""
    if maps.ndim != 4 or maps.shape[:2] != emb.shape[:2]:
        raise ValueError(f"the explainer gave maps of shape {tuple(maps.shape)}; expected [B, K, h, w] with B, K = "
                         f"{tuple(emb.shape[:2])}: one map for each image and concept")
    return maps.detach().to(emb.device)


def predictions(image_emb: Tensor, texts: dict[str, Tensor | list[Tensor]], batch: dict) -> dict[str, Tensor]:
    """What the image is taken for: `[B]` each.

    texts: "category" `[C, D]` and "concepts" `[C, D]`, see `category_weights`, what the categories are told by; and
    "options", for each part the embeddings that it is chosen from.
    """
    labels = batch["label"]
    image_emb, answer = at_least_float32(image_emb), lambda emb: (image_emb @ emb.to(image_emb).T).argmax(1).cpu()
    columns = {"label": labels, "group": batch.get("group", torch.full_like(labels, -1)),
               "correct": (answer(texts["category"]) == labels).float(),
               "correct_by_concepts": (answer(texts["concepts"]) == labels).float()}
    if texts["options"] and "attributes" in batch:
        answers = torch.stack([answer(option) for option in texts["options"]], dim=1)
        columns["concept_correct"] = (answers == batch["attributes"]).float().mean(1)
    return columns


def entanglement(maps: Tensor) -> dict[str, Tensor]:
    columns = {"dead_maps": metrics.dead_maps(maps, reduction="none").float()}
    if maps.shape[1] > 1:                                                # one map alone overlaps with nothing: NaN
        columns["overlap_cosine"] = metrics.overlap(maps, "cosine", reduction="none")
        columns["overlap_product"] = metrics.overlap(maps, "product", reduction="none")
    return columns


def localization(maps: Tensor, batch: dict, dataset, concepts: list[list[str]], radius: float) -> dict[str, Tensor]:
    """Metrics against the masks and points of a batch, on the concepts that name a part, and for each part alone.

    concepts: K of each category. radius: of the discs around points. A concept that names several parts is looked for
    in all of their masks together.
    """
    masks = {"part_masks": MASK_METRICS, "part_points": POINT_METRICS}
    found = [key for key in masks if key in batch]
    if not found:
        return {}
    parts, columns = part_names(dataset), {}
    named = named_parts(concepts, parts)[batch["label"]].to(maps.device)                        # [B, K, P]
    for key in found:
        areas = batch[key].to(maps.device)
        if key == "part_points":
            areas = metrics.point_masks(areas, batch["image"].shape[2:], radius)
        if areas.shape[1] != len(parts):
            raise ValueError(f"an item has {areas.shape[1]} {key}, but the data set names {len(parts)} parts: "
                             f"{', '.join(parts)}. Expected one for each, in the same order.")
        chosen = (named.float() @ areas.flatten(2).float() > 0).unflatten(-1, areas.shape[2:])  # [B, K, H, W]
        for name, metric in masks[key].items():
            columns[name] = values = metric(maps, chosen, reduction="none")
            for p, part in enumerate(parts):
                columns[f"{name}/{part}"] = values.masked_fill(~named[..., p], torch.nan)
    return columns


def faithfulness(vlm, images: Tensor, emb: Tensor, maps: Tensor, explainer: Explainer | None) -> dict[str, Tensor]:
    """Insertion and deletion, with both baselines. The explainer is not asked again."""
    score, columns = cosine_with(vlm, emb), {}
    for name in ("insertion_fidelity", "insertion_auc", "deletion_auc"):
        columns[name] = getattr(metrics, name)(score, images, maps, reduction="none")
    for name in ("insertion_auc", "deletion_auc"):
        columns[f"{name}_mean"] = getattr(metrics, name)(score, images, maps, reduction="none", baseline="mean")
    return columns


def cosine_with(vlm, emb: Tensor) -> metrics.faithfulness.Score:
    """score(images, k): the cosine of each image with text k of its own, `emb` `[B, K, D]`.

    The last images are remembered: where a metric passes the same ones for every concept, they are encoded once.
    """
    last = [None, None]

    def score(images: Tensor, k: int) -> Tensor:
        if images is not last[0]:
            last[:] = images, vlm.encode_image(images)
        return cosines(last[1], emb[:, k:k + 1])[:, 0]

    return score


def of_some(columns: dict[str, Tensor], chosen: list[int], size: int) -> dict[str, Tensor]:
    """Columns of a few images -> columns of the whole batch of `size`, NaN for the others."""
    full = {name: torch.full((size, values.shape[1]), torch.nan, dtype=torch.float64)
            for name, values in columns.items()}
    for name, values in columns.items():
        full[name][chosen] = values.cpu().double()
    return full
