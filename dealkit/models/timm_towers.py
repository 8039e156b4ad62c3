"""Where timm's towers are cut: ViTs that pool by CLS, average or attention, and networks that end in a feature map.

Every cut calls the trunk's own `forward_features` (or its parts one after another) and its own `forward_head`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from open_clip.timm_model import TimmModel
from timm.layers import AttentionPoolLatent
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.fastvit import FastVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dealkit.models.blocks import find_kind
from dealkit.models.pooled import Pooled, open_latent, pooled_cuts
from dealkit.models.split import Family, Split, check_complete, feature_split, only_last, unsupported
from dealkit.models.stack import Extras, Stack, stack_cuts

VITS = (VisionTransformer, Eva, VisionTransformerRelPos)
MAPS = {ConvNeXt: "ConvNeXt", FastVit: "FastViT", SwinTransformer: "Swin transformer"}


def find_timm_family(visual: TimmModel) -> Family:
    """The cuts of a timm tower; NotImplementedError for a trunk, a pooling or a block that nothing here stands for."""
    trunk = visual.trunk
    if type(trunk) in MAPS:
        step = trunk.feature_info[-1]["reduction"]
        return Family(MAPS[type(trunk)], tuple(-(-size // step) for size in visual.image_size), {"features": cut_map})
    if type(trunk) not in VITS:
        raise unsupported(f"a timm tower ({type(trunk).__name__})")
    # not patch_embed.grid_size: a ViT without position embeddings may be given images of another size
    grid = tuple(trunk.patch_embed.dynamic_feat_size(visual.image_size))
    features = partial(cut_last_tokens, grid)
    pool = getattr(trunk, "attn_pool", None)
    if pool is not None:
        if not isinstance(pool, AttentionPoolLatent) or not (pool.pool == "token" or pool.latent_len == 1):
            raise unsupported(f"a timm tower ({type(trunk).__name__}) with a {type(pool).__name__} pool")
        return Family("attention-pooled timm ViT", grid, pooled_cuts(partial(_pooled, grid), features))
    if trunk.global_pool == "token":
        find_kind(trunk.blocks[-1])
        return Family("CLS-pooled timm ViT", grid, stack_cuts(partial(_stack, grid)))
    if trunk.global_pool:
        return Family("average-pooled timm ViT", grid, {"features": features})
    raise unsupported(f"a timm tower ({type(trunk).__name__}) without pooling")


def cut_map(visual: TimmModel, images: Tensor, block: int = -1) -> Split:
    """Cut at the last feature map, `[B, C, h, w]`; timm's head pools and projects it."""
    only_last(block, MAPS[type(visual.trunk)], "its last feature map")
    features = visual.trunk.forward_features(images)
    if not isinstance(visual.trunk, SwinTransformer):
        return feature_split(features, partial(_head, visual))
    return feature_split(features.permute(0, 3, 1, 2), lambda features: _head(visual, features.permute(0, 2, 3, 1)))


def cut_last_tokens(grid: tuple[int, int], visual: TimmModel, images: Tensor, block: int = -1) -> Split:
    """Cut a ViT at its last patch tokens, after its last LayerNorm where that precedes the pooling."""
    only_last(block, "timm ViT", "its last tokens")
    count = visual.trunk.num_prefix_tokens
    tokens = check_complete(visual.trunk.forward_features(images), count + grid[0] * grid[1])
    prefix, patches = tokens.tensor_split([count], dim=1)
    return feature_split(patches.mT.unflatten(2, grid),
                         lambda features: _head(visual, torch.cat([prefix, features.flatten(2).mT], dim=1)))


def _pooled(grid: tuple[int, int], visual: TimmModel) -> Pooled:
    """SigLIP's or Perception Encoder's ViT: the latent query reads the last tokens after their LayerNorm."""
    trunk = visual.trunk
    count = trunk.num_prefix_tokens + grid[0] * grid[1]
    skip = trunk.num_prefix_tokens  # EVA pools all tokens, a plain ViT may pool the patches alone
    if isinstance(trunk, Eva) or getattr(trunk, "pool_include_prefix", True):
        skip = 0

    def tokens(images: Tensor, only_last: bool) -> Iterator[Tensor]:
        if only_last:
            yield check_complete(trunk.forward_features(images), count)[:, skip:]
            return
        x, extras = _EMBED[type(trunk)](trunk, images)
        save_memory = trunk.grad_checkpointing and torch.is_grad_enabled()
        for block, options in zip(trunk.blocks, extras):
            x = checkpoint(block, x, use_reentrant=False, **options) if save_memory else block(x, **options)
            yield check_complete(trunk.norm(x), count)[:, skip:]

    def finish(pooled: Tensor) -> Tensor:
        return visual.head(trunk.head(trunk.head_drop(trunk.fc_norm(pooled[:, 0]))))

    return Pooled(tokens, lambda tokens: open_latent(trunk.attn_pool, tokens, finish), trunk.num_prefix_tokens - skip)


def _stack(grid: tuple[int, int], visual: TimmModel) -> Stack:
    """A ViT with a class token, taken apart."""
    trunk = visual.trunk
    return Stack(trunk.blocks, find_kind(trunk.blocks[-1]), partial(_EMBED[type(trunk)], trunk),
                 lambda x: _head(visual, trunk.norm(x)), grid, trunk.num_prefix_tokens, trunk.grad_checkpointing)


def _embed_vit(trunk: VisionTransformer, images: Tensor) -> tuple[Tensor, Extras]:
    x = trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(images))))
    return x, [{}] * len(trunk.blocks)


def _embed_eva(trunk: Eva, images: Tensor) -> tuple[Tensor, Extras]:
    x, rope = trunk._pos_embed(trunk.patch_embed(images))
    per_block = rope if getattr(trunk, "rope_mixed", False) else [rope] * len(trunk.blocks)
    return trunk.norm_pre(x), [{"rope": rope} for rope in per_block]


def _embed_rel_pos(trunk: VisionTransformerRelPos, images: Tensor) -> tuple[Tensor, Extras]:
    x = trunk.patch_embed(images)
    x = torch.cat([trunk.cls_token.expand(len(x), -1, -1), x], dim=1)
    shared = None if trunk.shared_rel_pos is None else trunk.shared_rel_pos.get_bias()
    return x, [{"shared_rel_pos": shared}] * len(trunk.blocks)


_EMBED: dict[type[nn.Module], Callable[..., tuple[Tensor, Extras]]] = {
    VisionTransformer: _embed_vit, Eva: _embed_eva, VisionTransformerRelPos: _embed_rel_pos}


def _head(visual: TimmModel, x: Tensor) -> Tensor:
    """timm's own head and open_clip's projection; its attention, if any, must be differentiable twice."""
    with sdpa_kernel(SDPBackend.MATH):
        return visual.head(visual.trunk.forward_head(x))
