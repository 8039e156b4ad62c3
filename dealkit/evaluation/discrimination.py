"""Which concepts tell images of their category from others?"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.utils.data import Subset

from dealkit.evaluation.columns import evenly_spread
from dealkit.evaluation.embeddings import embed, labels_of


def embed_images(vlm, dataset, n: int = 320, batch_size: int = 128) -> tuple[Tensor, Tensor]:
    """Embeddings and labels of n images, evenly spread over the data set -> ([n, D] unit norm, [n]), on the CPU."""
    chosen = Subset(dataset, evenly_spread(n, len(dataset)))
    return embed(vlm, chosen, batch_size), labels_of(chosen)


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
