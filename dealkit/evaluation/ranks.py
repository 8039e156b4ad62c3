"""Retrieval between images and captions: each image looks for its category's caption, each caption for its images.

There is one caption a category, so that no data set needs captions of its own. What is kept are places in rankings, two
numbers an image; the recall for any k follows from them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from dealkit import metrics
from dealkit.inputs import concept_lists
from dealkit.normalize import at_least_float32

AT_ONCE = 16_000_000             # scores in memory at a time: 64 MB in float32
TEXTS_AT_ONCE = 256


def caption_embeddings(vlm, concepts: Mapping[str, Sequence[str]], category_prompt: str) -> Tensor:
    """One caption a category, "<prompt> with <concept>, <concept>, ...", as fine-tuning has them -> `[C, D]`.

    Warns:
        UserWarning: a caption that is longer than the model's context; concepts are left out from its end.
    """
    captions = [f"{category_prompt.format(name)} with {', '.join(some)}" for name, some in concepts.items()]
    with torch.no_grad():
        try:
            return encode_texts(vlm, captions)
        except ValueError as error:
            if not _too_long(error):
                raise
        found = [_longest(vlm, name, some, category_prompt) for name, some in concepts.items()]
    short = [f"{name!r} ({used} of {len(some)})" for (_, used), (name, some) in zip(found, concepts.items())
             if used < len(some)]
    warnings.warn(f"the captions of {len(short)} of {len(concepts)} categories are too long for the model with all of "
                  f"their concepts: {', '.join(short[:3])}{', ...' if len(short) > 3 else ''}. Retrieval uses the "
                  "first concepts of these, as many as fit.", stacklevel=3)
    return torch.cat([emb for emb, _ in found])


def encode_texts(vlm, texts: Sequence[str]) -> Tensor:
    """Any number of texts -> `[K, D]`, in portions, so that ImageNet's 1,000 categories need no more memory than 256.
    """
    return torch.cat([vlm.encode_text(texts[i:i + TEXTS_AT_ONCE]) for i in range(0, len(texts), TEXTS_AT_ONCE)])


def _longest(vlm, name: str, concepts: Sequence[str], category_prompt: str) -> tuple[Tensor, int]:
    """The embedding `[1, D]` of the longest caption that fits, and how many concepts are in it."""
    prompt = category_prompt.format(name)
    for used in range(len(concepts), 0, -1):
        try:
            return vlm.encode_text([f"{prompt} with {', '.join(concepts[:used])}"]), used
        except ValueError as error:
            if not _too_long(error):
                raise
    return vlm.encode_text([prompt]), 0


def _too_long(error: ValueError) -> bool:
    return "longer than the model's context" in str(error)


@torch.no_grad()
def ranks(image_emb: Tensor, caption_emb: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Where images and captions of the same category stand in each other's rankings.

    Args:
        image_emb: `[N, D]`. caption_emb: `[C, D]`; normalised inside, both. labels: `[N]`, 0..C-1.

    Returns:
        caption_rank: `[N]`, the place of its own caption among the C captions of each image, from 1; image_rank: `[N]`,
        the place of each image in the ranking of its own caption, among it and all images of other categories. The
        best image_rank of a category is where its caption finds the first of its images. Of equal scores, the wrong
        ones come first (see `metrics.retrieval.first_relevant`).

    Raises:
        ValueError: embeddings that are not finite.
    """
    image_emb, caption_emb = (F.normalize(at_least_float32(emb.detach().cpu()), dim=-1)
                              for emb in (image_emb, caption_emb))
    for name, emb in (("images", image_emb), ("captions", caption_emb)):
        if not emb.isfinite().all():
            raise ValueError(f"embeddings of {name} hold NaN or infinite values; an order of them would be arbitrary. "
                             "Check the model (half precision, a diverged training run).")
    labels = labels.cpu()
    caption_rank, image_rank = torch.zeros_like(labels), torch.zeros_like(labels)
    for rows in torch.arange(len(labels)).split(max(1, AT_ONCE // len(caption_emb))):
        scores = image_emb[rows] @ caption_emb.T
        caption_rank[rows] = (scores >= scores.gather(1, labels[rows, None])).sum(1)         # its own is one of them
    for some in torch.arange(len(caption_emb)).split(max(1, AT_ONCE // len(labels))):
        for c, scores in zip(some.tolist(), caption_emb[some] @ image_emb.T):
            own = labels == c
            others = scores[~own].sort().values
            image_rank[own] = 1 + len(others) - torch.searchsorted(others, scores[own])      # those >= the image's own
    return {"caption_rank": caption_rank, "image_rank": image_rank}


def recalls(table: pd.DataFrame, ks: Iterable[int]) -> dict[str, float]:
    """Recalls with their 95 % intervals from a table with the columns label, caption_rank and image_rank.

    The bootstrap draws queries: images in the one direction, categories (those that have images) in the other.
    """
    ways = {"image_to_text": table.get("caption_rank"),
            "text_to_image": table.groupby("label")["image_rank"].min() if "image_rank" in table else None}
    row = {}
    for way, places in ways.items():
        for k in ks:
            name, hits = f"{way}_recall_{k}", None if places is None else (places <= k).to_numpy(float)
            row[name] = np.nan if hits is None else hits.mean()
            row[f"{name}_low"], row[f"{name}_high"] = \
                (np.nan, np.nan) if hits is None else metrics.bootstrap_interval(hits)
    return row


def retrieval(embeddings: Tensor, labels: Tensor, vlm, bank: Mapping[str, Sequence[str]], categories: Sequence[str],
              ks: Sequence[int] = (1, 5, 10), category_prompt: str = "a photo of a {}") -> pd.Series:
    """How often do images find the caption of their category, and captions an image of theirs, among the first k?

    Args:
        embeddings: of the images, `[N, D]`, from `embed`. labels: `[N]` integers.
        vlm: the model that they are from; it reads the captions. bank: concepts of each category.
        categories: names of the labels. ks: how many places are looked at.
        category_prompt: text of a category; use the one of training.

    Returns:
        image_to_text_recall_<k> for every k, then text_to_image_recall_<k>, each with <name>_low and <name>_high
        (95 %, bootstrap over the queries); n, the number of images; n_texts, the number of captions that had images to
        find. All categories' captions are in the gallery, also of those without an image.

    Raises:
        KeyError: a category is missing from the bank.
        ValueError: shapes or labels that do not fit; a k below 1; no concepts; embeddings that are not finite.

    Warns:
        UserWarning: categories with unequal numbers of concepts (as many as all have are used); captions that do not
            fit into the model's context with all concepts.
    """
    if not ks or any(isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1 for k in ks):
        raise ValueError(f"ks are {ks!r}; expected whole numbers of places, each at least 1.")
    labels = check_labels(labels, len(embeddings), len(categories))
    concepts, _ = concept_lists(bank, categories)
    caption_emb = caption_embeddings(vlm, concepts, category_prompt)
    if embeddings.ndim != 2 or embeddings.shape[1] != caption_emb.shape[1]:
        raise ValueError(f"embeddings have shape {tuple(embeddings.shape)}; expected [N, {caption_emb.shape[1]}], from "
                         "dealkit.evaluation.embed with this model.")
    table = pd.DataFrame({"label": labels.numpy()} |
                         {name: values.numpy() for name, values in ranks(embeddings, caption_emb, labels).items()})
    return pd.Series(recalls(table, ks) | {"n": len(table), "n_texts": table["label"].nunique()})


def check_labels(labels: Tensor, images: int, categories: int) -> Tensor:
    """Labels as a tensor `[images]` on the CPU; ValueError where they are not one integer in range for each image."""
    labels = torch.as_tensor(labels).cpu()
    if labels.shape != (images,) or labels.is_floating_point() or labels.dtype == torch.bool or images == 0:
        raise ValueError(f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected integers, one for each "
                         f"of {images} images, at least one.")
    if labels.min() < 0 or labels.max() >= categories:
        raise ValueError(f"labels run from {int(labels.min())} to {int(labels.max())}, but there are {categories} "
                         f"categories; expected labels in 0..{categories - 1}.")
    return labels.long()
