"""A tower that is cut computes what open_clip computes, and says so when it cannot be cut."""

from __future__ import annotations

import pytest
import torch
from conftest import random_images, tiny_resnet, tiny_vit
from open_clip.timm_model import TimmModel

from dealkit.models import check_images

VARIANTS = {"plain": {}, "layer scale": {"ls_init_value": 0.3}, "norm after pooling": {"final_ln_after_pool": True},
            "no norm before": {"no_ln_pre": True}, "one block": {"layers": 1}}


@pytest.fixture(params=["vit", "rn50", "birdworld_random"])
def stock(request):
    return request.getfixturevalue(request.param)


def test_the_split_gives_open_clips_embedding(stock):
    images = random_images(stock)
    with torch.no_grad():
        expected = stock.model.encode_image(images)
        for kind in stock.tower.cuts:
            split = stock.tower.split(images, kind=kind)
            torch.testing.assert_close(split.head(split.variable), expected, atol=1e-5, rtol=0)
            assert split.kind == kind


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_a_vit_at_every_block(variant):
    vlm = tiny_vit(**VARIANTS[variant])
    images = random_images(vlm)
    expected = vlm.model.encode_image(images)
    layers = len(vlm.model.visual.transformer.resblocks)
    for block in [*range(layers), -1, -layers]:
        split = vlm.tower.split(images, block=block)
        torch.testing.assert_close(split.head(split.variable), expected)
    split = vlm.tower.split(images, kind="features")
    torch.testing.assert_close(split.head(split.variable), expected)


def test_a_tower_without_projection():
    vlm = tiny_vit()
    vlm.model.visual.proj = None
    images = random_images(vlm)
    split = vlm.tower.split(images)
    torch.testing.assert_close(split.head(split.variable), vlm.model.encode_image(images))


def test_attention_rows_are_distributions_over_cls_and_patches(vit):
    with torch.no_grad():
        variable = vit.tower.split(random_images(vit)).variable
    assert variable.shape == (2, 12, 1 + 49)
    torch.testing.assert_close(variable.sum(dim=-1), torch.ones(2, 12))


def test_an_earlier_block_keeps_all_queries():
    vlm = tiny_vit()
    assert vlm.tower.split(random_images(vlm), block=0).variable.shape == (2, 4, 13, 13)


@pytest.mark.parametrize("build", [tiny_vit, tiny_resnet])
def test_one_offset_per_channel_stands_for_all_its_pixels(build):
    """`shifted` against the plain way: the offset added to every pixel; and its gradient: the sum over the pixels."""
    vlm = build()
    split = vlm.tower.split(random_images(vlm), kind="features")
    batch, channels, h, w = split.variable.shape
    assert (h, w) == vlm.grid
    delta = torch.randn(batch, channels, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(split.shifted(delta), split.head(split.variable + delta[..., None, None]))

    probe = torch.randn(batch, 24, dtype=torch.float64)
    features = split.variable.detach().requires_grad_()
    naive = torch.autograd.grad((split.head(features) * probe).sum(), features)[0].sum(dim=(2, 3))
    zero = torch.zeros_like(delta).requires_grad_()
    cheap = torch.autograd.grad((split.shifted(zero) * probe).sum(), zero)[0]
    torch.testing.assert_close(cheap, naive)
    assert naive.abs().max() > 1e-3


def test_gradient_checkpointing_changes_nothing():
    images, gradients = random_images(tiny_vit()), []
    for enabled in (False, True):
        vlm = tiny_vit()
        vlm.model.set_grad_checkpointing(enabled)
        split = vlm.tower.split(images)
        split.head(split.variable).square().sum().backward()
        gradients.append(vlm.model.visual.conv1.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().max() > 0


def test_the_first_method_and_kind_are_the_papers(vit, rn50):
    assert vit.tower.methods[0] == "relevance" and list(vit.tower.cuts)[0] == "attention"
    assert rn50.tower.methods == ("gradcam",) and list(rn50.tower.cuts) == ["features"]
    assert vit.grid == rn50.grid == (7, 7)
    assert tiny_vit().grid == (4, 3)


def test_a_model_without_a_cut_still_encodes():
    vlm = tiny_vit(image_size=64, dtype=torch.float32)
    vlm.model.visual = TimmModel("test_efficientnet", embed_dim=24, image_size=64).eval()
    assert vlm.encode_image(random_images(vlm)).shape == (2, 24)
    with pytest.raises(NotImplementedError, match="(?s)EfficientNet.*CLS-pooled ViT.*ModifiedResNet.*encode_image"):
        vlm.grid


@pytest.mark.parametrize("error, says, images", [
    (TypeError, "torch.stack", [[0.0]]),
    (ValueError, r"images\[None\]", torch.zeros(3, 32, 24)),
    (ValueError, "torch.stack single", torch.zeros(32, 24)),
    (ValueError, "empty batch", torch.zeros(0, 3, 32, 24)),
    (ValueError, "vlm.preprocess resizes", torch.zeros(2, 3, 24, 32)),
    (ValueError, "colour channels first", torch.zeros(2, 32, 24, 3)),
    (TypeError, "uint8", torch.zeros(2, 3, 32, 24, dtype=torch.uint8)),
    (ValueError, r"images \[1\]", torch.stack([torch.zeros(3, 32, 24), torch.full((3, 32, 24), torch.nan)])),
    (ValueError, "infinite", torch.full((1, 3, 32, 24), torch.inf)),
])
def test_bad_images(error, says, images):
    vlm = tiny_vit()
    for use in (lambda x: check_images(x, (32, 24)), vlm.tower.split, vlm.encode_image):
        with pytest.raises(error, match=says):
            use(images)


def test_normalised_images_lie_outside_0_to_1_and_are_accepted():
    vlm = tiny_vit()
    vlm.tower.split(5 * random_images(vlm).float())  # another dtype is cast


def test_bad_cuts():
    vlm, resnet = tiny_vit(), tiny_resnet()
    images = random_images(vlm)
    with pytest.raises(ValueError, match="block 3 does not exist.*3 blocks"):
        vlm.tower.split(images, block=3)
    with pytest.raises(ValueError, match="block=-1"):
        vlm.tower.split(images, block=0, kind="features")
    with pytest.raises(ValueError, match="'colour'.*attention"):
        vlm.tower.split(images, kind="colour")
    with pytest.raises(ValueError, match="'attention'.*features"):
        resnet.tower.split(random_images(resnet), kind="attention")
    with pytest.raises(ValueError, match="last stage only"):
        resnet.tower.split(random_images(resnet), block=1)


def test_dropped_patches_are_refused():
    vlm = tiny_vit(patch_dropout=0.5)
    vlm.tower.split(random_images(vlm))  # eval mode: nothing is dropped
    vlm.model.train()
    with pytest.raises(ValueError, match=r"vlm.model.eval\(\)"):
        vlm.tower.split(random_images(vlm))
