"""A tower of a few thousand weights for every kind of image tower, in float64, with nothing at 0 or 1."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cache

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers import AttentionPoolLatent
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.fastvit import FastVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer as TimmViT
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn
from tower_check import ImageOnly, sample, wake

from dealkit.models import VLM

SIZE, DIM = (32, 24), 12  # grid of 4 x 3
OPEN_CLIP = {"image_size": SIZE, "patch_size": 8, "width": 32, "layers": 3, "heads": 4, "mlp_ratio": 2.0,
             "output_dim": DIM}
TIMM = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0,
        "num_classes": DIM}
ROPE = {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
CUSTOM = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True,
          "ls_init_value": 0.5}


def wrap(trunk: nn.Module, size: tuple[int, int] = SIZE, projected: int | None = None) -> TimmModel:
    """open_clip's wrapper around a trunk of our own size; `projected`: the trunk's width, for a linear projection."""
    visual = _wrapper()
    visual.trunk, visual.image_size, visual.head = trunk, size, nn.Sequential()
    if projected:
        visual.head = nn.Sequential(OrderedDict(drop=nn.Dropout(0.0), proj=nn.Linear(projected, DIM, bias=False)))
    return visual


def _wrapper() -> TimmModel:
    return TimmModel("test_vit", embed_dim=DIM, pool="token", proj=None)


def _with_pool(trunk: nn.Module, pool: nn.Module) -> TimmModel:
    trunk.attn_pool = pool
    return wrap(trunk)


TOWERS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "CLS-pooled ViT with custom blocks": {
        "custom blocks": lambda: VisionTransformer(**OPEN_CLIP, **CUSTOM),
        "custom blocks, norm after pooling": lambda: VisionTransformer(**OPEN_CLIP, qk_norm=True,
                                                                       final_ln_after_pool=True)},
    "average-pooled ViT": {
        "average": lambda: VisionTransformer(**OPEN_CLIP, pool_type="avg"),
        "average, norm after pooling": lambda: VisionTransformer(**OPEN_CLIP, pool_type="avg", no_ln_pre=True,
                                                                 final_ln_after_pool=True)},
    "attention-pooled ViT": {
        "CoCa": lambda: VisionTransformer(**OPEN_CLIP, attentional_pool=True, attn_pooler_queries=5,
                                          attn_pooler_heads=3, output_tokens=True),
        "CoCa, one width": lambda: VisionTransformer(**OPEN_CLIP | {"output_dim": 32}, attentional_pool=True,
                                                     attn_pooler_queries=2)},
    "attention-pooled ViT with averaged queries": {
        "CoCa, averaged": lambda: VisionTransformer(**OPEN_CLIP, attentional_pool=True, attn_pooler_queries=5,
                                                    attn_pooler_heads=3, pool_type="avg")},
    "CLS-pooled timm ViT": {
        "timm": lambda: wrap(TimmViT(**TIMM, qk_norm=True, scale_attn_norm=True, init_values=0.5)),
        "timm, registers, projected": lambda: wrap(TimmViT(**TIMM | {"num_classes": 0}, reg_tokens=2, pre_norm=True),
                                                   projected=32),
        "EVA": lambda: wrap(Eva(**TIMM, global_pool="token")),
        "EVA02": lambda: wrap(Eva(**TIMM, **ROPE, global_pool="token", qkv_fused=False, swiglu_mlp=True, scale_mlp=True,
                                  scale_attn_inner=True)),
        "EVA02-E": lambda: wrap(Eva(**TIMM, global_pool="token", use_post_norm=True)),
        "EVA, mixed rotations, layer scale": lambda: wrap(Eva(**TIMM, use_rot_pos_emb=True, rope_type="mixed",
                                                              attn_type="rope", global_pool="token", qk_norm=True,
                                                              init_values=0.5)),
        "relative positions": lambda: wrap(VisionTransformerRelPos(**TIMM, class_token=True, global_pool="token",
                                                                   rel_pos_type="bias")),
        "relative positions, shared": lambda: wrap(VisionTransformerRelPos(
            **TIMM, class_token=True, global_pool="token", rel_pos_type="bias", shared_rel_pos=True))},
    "attention-pooled timm ViT": {
        "SigLIP": lambda: wrap(TimmViT(**TIMM | {"num_classes": 0}, class_token=False, global_pool="map"),
                               projected=32),
        "SigLIP, every option": lambda: _with_pool(
            TimmViT(**TIMM, class_token=False, global_pool="map", fc_norm=True),
            AttentionPoolLatent(32, num_heads=4, feat_size=12, pos_embed="abs", qk_norm=True, latent_len=2,
                                norm_layer=nn.LayerNorm)),
        "timm, class token not pooled": lambda: wrap(TimmViT(**TIMM, global_pool="map")),
        "Perception Encoder": lambda: wrap(Eva(**TIMM, **ROPE, global_pool="map", attn_type="rope",
                                               use_pre_transformer_norm=True, attn_pool_num_heads=2))},
    "average-pooled timm ViT": {
        "timm, average": lambda: wrap(TimmViT(**TIMM | {"num_classes": 0}, class_token=False, global_pool="avg"),
                                      projected=32),
        "timm, average, norm before pooling": lambda: wrap(TimmViT(**TIMM, global_pool="avg", fc_norm=False)),
        "timm, average, another image size": lambda: wrap(TimmViT(**TIMM | {"img_size": 64}, class_token=False,
                                                                  global_pool="avg", pos_embed="none",
                                                                  dynamic_img_size=True))},
    "ConvNeXt": {
        "ConvNeXt": lambda: wrap(ConvNeXt(num_classes=DIM, depths=(1, 1, 1, 1), dims=(8, 12, 16, 20)), (96, 64))},
    "FastViT": {
        "FastViT": lambda: wrap(FastVit(num_classes=DIM, layers=(1, 1, 1, 1), embed_dims=(8, 16, 32, 64),
                                        mlp_ratios=(2, 2, 2, 2), token_mixers=("repmixer",) * 3 + ("attention",)),
                                (96, 64))},
    "Swin transformer": {
        "Swin": lambda: wrap(SwinTransformer(img_size=(32, 24), patch_size=4, num_classes=DIM, embed_dim=8,
                                             depths=(2, 2), num_heads=(2, 4), window_size=2), (32, 24))},
}
NAMES = [name for towers in TOWERS.values() for name in towers]
FAMILY = {name: family for family, towers in TOWERS.items() for name in towers}
STACKS = [name for name in NAMES if "CLS" in FAMILY[name]]
# towers whose embedding is read by one query
READERS = STACKS + [name for name in NAMES if FAMILY[name] in ("attention-pooled ViT", "attention-pooled timm ViT")]
# tokens before the patches in a row of attention, where they are not CLS alone
PREFIX = {"timm, registers, projected": 3, "SigLIP": 0, "SigLIP, every option": 0, "timm, class token not pooled": 0}


@cache
def tiny_tower(name: str) -> VLM:
    """A VLM with an image tower only; do not change it."""
    torch.manual_seed(0)
    visual = TOWERS[FAMILY[name]][name]().double().eval()
    wake(visual, tower_images(visual, count=6, seed=9))
    return VLM(name, ImageOnly(visual))


def tower_images(visual: nn.Module, count: int = 2, seed: int = 1) -> Tensor:
    return sample(visual, count, seed).double()


def tower_texts(vlm: VLM, count: int = 3) -> Tensor:
    """Text embeddings `[count, D]`."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, vlm.tower.output_dim, generator=generator, dtype=torch.float64)
