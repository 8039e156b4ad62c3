"""One trunk pass an image: the embedding and the maps come from the same cut of the tower."""

from __future__ import annotations

import inspect
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dealkit import metrics
from dealkit.evaluation.columns import Explainer, checked_maps, cosine_with
from dealkit.maps import VARIABLES, choose_method, contributions, explain, to_maps


def embed_and_explain(vlm, images: Tensor, emb: Tensor, explainer: Explainer | None,
                      embedding: bool = True) -> tuple[Tensor | None, Tensor]:
    """The embeddings of images, and their maps.

    `explain` itself (None, or a `functools.partial` of it with a method) and explainers with a parameter `split` share
    the trunk pass of the embedding. Any other explainer makes its own.

    Args:
        vlm: the model. images: `[B, 3, H, W]`. emb: text embeddings `[B, K, D]`.
        explainer: None, or as in `image_table`.
        embedding: False leaves the embedding out.

    Returns:
        (`[B, D]` of unit norm, or None; maps `[B, K, h, w]`, without gradients).

    Raises:
        ValueError: maps of another shape. As `explain`.
    """
    rule = _options_of_explain(explainer)
    if rule is None and not takes_split(explainer):
        with torch.no_grad():
            image_emb = vlm.encode_image(images) if embedding else None
        return image_emb, checked_maps(explainer(vlm, images, emb), emb)
    with torch.inference_mode(False), torch.no_grad():
        method = None if rule is None else choose_method(vlm.tower, rule.get("method"))
        kind = getattr(explainer, "kind", None) if rule is None else VARIABLES[method]
        split = vlm.tower.split(vlm.check_images(images), kind=kind)
        emb = emb.clone()                        # those of inference mode cannot take part in a gradient
        image_emb = F.normalize(split.head(split.variable), dim=-1) if embedding else None
        maps = explainer(vlm, images, emb, split=split) if rule is None else \
            to_maps(contributions(split, emb, vlm.grid, method=method), rule.get("signed", False))
    return image_emb, checked_maps(maps, emb)


def stability(vlm, images: Tensor, emb: Tensor, maps: Tensor, explainer: Explainer | None) -> dict[str, Tensor]:
    """Infidelity and max-sensitivity, at their default settings."""
    def again(x: Tensor) -> Tensor:
        return embed_and_explain(vlm, x, emb, explainer, embedding=False)[1]

    return {"infidelity": metrics.infidelity(cosine_with(vlm, emb), images, maps, reduction="none"),
            "max_sensitivity": metrics.max_sensitivity(again, images, reduction="none")}


def takes_split(explainer: Explainer) -> bool:
    """Whether an explainer has a parameter called split."""
    try:
        return "split" in inspect.signature(explainer).parameters
    except (TypeError, ValueError):              # a callable that does not tell
        return False


def _options_of_explain(explainer: Explainer | None) -> dict | None:
    """method and signed where the explainer is `explain`, as it is or through a partial; None for any other."""
    if explainer is None or explainer is explain:
        return {}
    if isinstance(explainer, partial) and explainer.func is explain and not explainer.args \
            and set(explainer.keywords) <= {"method", "signed"}:
        return explainer.keywords
    return None
