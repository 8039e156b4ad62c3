"""Where CLIP's ResNet, with its attention pooling, is cut."""

from __future__ import annotations

from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dealkit.models.split import Split, per_head


def cut_resnet(visual: ModifiedResNet, images: Tensor, block: int = -1, save_memory: bool = False) -> Split:
    """Cut CLIP's ResNet at its last feature map (layer4); the head is the attention pooling.

    Attention pooling turns the h*w feature vectors and their mean into tokens; the mean asks, all answer. An offset
    `delta` per channel moves every token alike. The query moves by `W_q delta`. Each logit gains the same number from
    the keys, which the softmax ignores. The attention sums to one, so what is read moves by exactly `W_v delta`.

    `save_memory` recomputes every block in the backward pass; open_clip has no such switch for this tower.
    """
    if block != -1:
        raise ValueError(f"block {block} was asked for, but a ModifiedResNet is cut at its last stage only: block=-1.")
    parts = [visual.stem, visual.layer1, visual.layer2, visual.layer3, visual.layer4]
    if save_memory:
        parts = [partial(checkpoint, block, use_reentrant=False) for block in (visual.stem, *chain(*parts[1:]))]
    features = images
    for part in parts:
        features = part(features)
    pool = visual.attnpool

    def project(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = features.flatten(2).mT
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + pool.positional_embedding
        projected = pool.q_proj(tokens[:, :1]), pool.k_proj(tokens), pool.v_proj(tokens)
        return tuple(per_head(x, pool.num_heads) for x in projected)

    def read(q: Tensor, k: Tensor, v: Tensor, value_offset: Tensor | float = 0.0) -> Tensor:
        attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
        context = attention @ v + value_offset  # [B, heads, 1, d]
        return pool.c_proj(context.transpose(1, 2).flatten(1))

    q, k, v = project(features)

    def shifted(delta: Tensor) -> Tensor:
        query_offset = per_head(F.linear(delta[:, None], pool.q_proj.weight), pool.num_heads)
        value_offset = per_head(F.linear(delta[:, None], pool.v_proj.weight), pool.num_heads)
        return read(q + query_offset, k, v, value_offset)

    return Split(features, lambda features: read(*project(features)), "features", shifted)
