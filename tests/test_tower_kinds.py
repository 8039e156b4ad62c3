"""Every kind of image tower in small: its cuts give the stock tower's embedding, and what has no cut says so."""

from __future__ import annotations

import pytest
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock
from timm.models.vision_transformer import VisionTransformer as TimmViT
from tiny_towers import FAMILY, NAMES, OPEN_CLIP, PREFIX, STACKS, TIMM, TOWERS, tiny_tower, tower_images, wrap
from torch import nn
from tower_check import ImageOnly, blocks_of

from dealkit.models import VLM, find_tower
from dealkit.models.blocks import KINDS


@pytest.fixture(params=NAMES)
def vlm(request) -> VLM:
    return tiny_tower(request.param)


def test_family_and_grid_and_every_cut_is_the_stock_tower(vlm):
    images = tower_images(vlm.model.visual)
    expected = vlm.model.encode_image(images).detach()
    assert vlm.tower.family == FAMILY[vlm.name]
    assert len({tuple(image) for image in expected.round(decimals=3).tolist()}) == 2 and expected.std() > 0.1
    for kind in vlm.tower.cuts:
        split = vlm.tower.split(images, kind=kind)
        torch.testing.assert_close(split.head(split.variable), expected)
        assert split.kind == kind
        if kind == "features":
            assert tuple(split.variable.shape[2:]) == vlm.grid
        if kind == "attention":
            torch.testing.assert_close(split.variable.sum(dim=-1), torch.ones(split.variable.shape[:2]).double())
            assert split.variable.shape[2] == PREFIX.get(vlm.name, 1) + vlm.grid[0] * vlm.grid[1]


def test_one_offset_per_channel_stands_for_all_its_pixels(vlm):
    split = vlm.tower.split(tower_images(vlm.model.visual), kind="features")
    delta = torch.randn(split.variable.shape[:2], dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(split.shifted(delta), split.head(split.variable + delta[..., None, None]))


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_is_cut_at_any_block(name):
    vlm = tiny_tower(name)
    images = tower_images(vlm.model.visual)
    expected, tokens = vlm.model.encode_image(images), PREFIX.get(name, 1) + 12
    for block in (0, 1, -3):
        split = vlm.tower.split(images, block=block)
        assert split.variable.shape == (2, 4, tokens, tokens)
        torch.testing.assert_close(split.head(split.variable), expected)
        again = torch.autograd.grad(split.head(split.variable).sum(), split.variable, create_graph=True)[0]
        torch.autograd.grad(again.square().sum(), split.variable)  # the blocks behind the cut, twice
    with pytest.raises(ValueError, match="block 3 does not exist.*3 blocks"):
        vlm.tower.split(images, block=3)


def test_other_cuts_are_at_the_end_only(vlm):
    images = tower_images(vlm.model.visual)
    for kind in vlm.tower.cuts:
        if kind != "attention" or vlm.name not in STACKS:
            with pytest.raises(ValueError, match="block 0 was asked for.*block=-1"):
                vlm.tower.split(images, block=0, kind=kind)


@pytest.mark.parametrize("family, build", {
    "'parallel'": lambda: VisionTransformer(**OPEN_CLIP, attentional_pool="parallel",
                                            attn_pooler_heads=3),
    "ViT without pooling": lambda: VisionTransformer(**OPEN_CLIP, pool_type="none"),
    "scaled cosine attention": lambda: VisionTransformer(**OPEN_CLIP, scaled_cosine_attn=True),
    "EfficientNet": lambda: TimmModel("test_efficientnet", embed_dim=8, pool="avg", proj="linear"),
    r"timm tower \(VisionTransformer\) without pooling": lambda: wrap(TimmViT(**TIMM, global_pool="")),
    "AttentionPoolPrr": lambda: wrap(TimmViT(**TIMM, global_pool="prr")),
    "gated or grouped-query": lambda: wrap(Eva(**TIMM, global_pool="token", attn_type="rope", qkv_fused=False,
                                               num_kv_heads=2)),
    "ResPostBlock": lambda: wrap(TimmViT(**TIMM, block_fn=ResPostBlock)),
    "Linear": lambda: nn.Linear(2, 2),
}.items())
def test_what_has_no_cut_is_named(family, build):
    with pytest.raises(NotImplementedError, match=f"(?s){family}.*CLS-pooled ViT.*ModifiedResNet"):
        find_tower(build())


@pytest.mark.parametrize("build", [
    lambda: wrap(TimmViT(**TIMM, patch_drop_rate=0.5)), lambda: wrap(Eva(**TIMM, global_pool="token",
                                                                         patch_drop_rate=0.5)),
    lambda: wrap(TimmViT(**TIMM, global_pool="map", patch_drop_rate=0.5)),
    lambda: wrap(TimmViT(**TIMM, global_pool="avg", patch_drop_rate=0.5)),
    lambda: VisionTransformer(**OPEN_CLIP, pool_type="avg", patch_dropout=0.5)])
def test_dropped_patches_are_refused(build):
    vlm = VLM("dropping", ImageOnly(build().eval()))
    images = tower_images(vlm.model.visual).float()
    for kind in vlm.tower.cuts:
        vlm.model.eval()
        vlm.tower.split(images, kind=kind)
        vlm.model.train()
        with pytest.raises(ValueError, match=r"vlm.model.eval\(\)"):
            vlm.tower.split(images, kind=kind)


def test_a_timm_tower_of_another_image_size():
    """The grid follows the images, as open_clip's force_image_size sets them."""
    visual = wrap(TimmViT(**TIMM, class_token=False, global_pool="map")).eval()
    visual.set_input_size((24, 40))
    tower, images = find_tower(visual), torch.randn(2, 3, 24, 40)
    assert tower.grid == (3, 5)
    split = tower.split(images)
    torch.testing.assert_close(split.head(split.variable), visual(images))


def test_every_kind_of_block_is_tested():
    """Add a tiny tower with each new kind."""
    built = {type(block) for towers in TOWERS.values() for name in towers if name in STACKS
             for block in blocks_of(tiny_tower(name).model.visual)}
    assert built == set(KINDS)
