"""Every method on every kind of image tower in small, against the stock tower's own autograd."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from attention_watch import watched
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmViT
from tiny_birds import BANK, bird_vlm
from tiny_towers import (
    FAMILY, NAMES, PREFIX, READERS, ROPE, STACKS, TIMM, tiny_tower, tower_images, tower_texts, wrap,
)
from torch import nn
from tower_check import ImageOnly, blocks_of, wake

import dealkit
from dealkit import DealConfig
from dealkit.attribution import attribute
from dealkit.datasets import Birdworld
from dealkit.maps import contributions, to_maps
from dealkit.models import VLM
from dealkit.training import DealObjective

BIRDS = TIMM | {"img_size": 80, "patch_size": 16, "num_classes": 24}

@pytest.fixture(params=NAMES)
def vlm(request) -> VLM:
    return tiny_tower(request.param)


@pytest.fixture(params=READERS)
def reader(request) -> VLM:
    """A tower whose embedding is read by one query."""
    return tiny_tower(request.param)


def score(embedding, text):
    return F.cosine_similarity(embedding, text[None]).sum()


def gradient(embedding, text, *inputs):
    return torch.autograd.grad(score(embedding, text), inputs, retain_graph=True)


def alive(maps):
    """Most maps say something: two that are all zero are equal whatever made them."""
    return (maps.amax(dim=(2, 3)) > 0).double().mean() > 0.5


def patches(vlm, rows):
    """What belongs to the patches in `[..., prefix + h*w]`, as `[..., h, w]`."""
    return rows[..., PREFIX.get(vlm.name, 1):].unflatten(-1, vlm.grid)


def test_relevance_is_attention_times_its_gradient_in_the_stock_tower(reader):
    images, texts = tower_images(reader.model.visual), tower_texts(reader)
    maps = dealkit.explain(reader, images, texts, method="relevance")
    embedding, call = watched(reader.model.visual, images)
    for number, text in enumerate(texts):
        product = call["attention"] * gradient(embedding, text, call["attention"])[0]
        expected = patches(reader, product[:, :, 0].clamp(min=0).mean(dim=1))
        torch.testing.assert_close(maps[:, number], expected.detach())
    assert alive(maps)


@pytest.mark.parametrize("name", STACKS)
def test_relevance_of_an_earlier_block_too(name):
    vlm = tiny_tower(name)
    images, texts = tower_images(vlm.model.visual), tower_texts(vlm, 1)
    maps = to_maps(contributions(vlm.tower.split(images, block=1), texts, vlm.grid))
    embedding, call = watched(vlm.model.visual, images, call=1)
    product = call["attention"] * gradient(embedding, texts[0], call["attention"])[0]
    torch.testing.assert_close(maps[:, 0], patches(vlm, product[:, :, 0].clamp(min=0).mean(dim=1)).detach())
    assert alive(maps)


def test_gradeclip_is_its_formula_in_the_stock_tower(reader):
    images, texts = tower_images(reader.model.visual), tower_texts(reader)
    maps = dealkit.explain(reader, images, texts, method="gradeclip")
    embedding, call = watched(reader.model.visual, images)
    q, k = (x.movedim(1, 2).flatten(2) for x in (call["q"], call["k"]))  # all heads as one
    closeness = patches(reader, F.cosine_similarity(q[:, :1], k, dim=-1))
    low, high = closeness.amin(dim=(1, 2), keepdim=True), closeness.amax(dim=(1, 2), keepdim=True)
    closeness = (closeness - low) / (high - low)
    for number, text in enumerate(texts):
        weights = gradient(embedding, text, call["context"])[0][:, :, :1]
        evidence = patches(reader, (weights * call["v"]).sum(dim=(1, 3)))
        torch.testing.assert_close(maps[:, number], (evidence * closeness).clamp(min=0).detach())
    assert alive(maps)


def test_methods_of_every_block_are_gradients_in_stock_towers_that_end_at_each_block(reader):
    """A tower that ends at a block: a copy of the stock tower without the blocks behind it."""
    visual = reader.model.visual
    images, texts = tower_images(visual), tower_texts(reader, 2)
    maps = {method: dealkit.explain(reader, images, texts, method=method) for method in ("legrad", "every_exit")}
    expected = {method: torch.zeros_like(m) for method, m in maps.items()}
    for depth in range(1, len(blocks_of(visual)) + 1):
        short = copy.deepcopy(visual)
        owner, name = (short.trunk, "blocks") if isinstance(short, TimmModel) else (short.transformer, "resblocks")
        setattr(owner, name, type(getattr(owner, name))(*list(getattr(owner, name))[:depth])
                if name == "blocks" and isinstance(owner.blocks, nn.Sequential)
                else nn.ModuleList(list(getattr(owner, name))[:depth]))
        embedding, call = watched(short, images)
        for number, text in enumerate(texts):
            slopes = gradient(embedding, text, call["attention"])[0][:, :, 0]
            for method, rows in (("legrad", slopes), ("every_exit", slopes * call["attention"][:, :, 0])):
                expected[method][:, number] += patches(reader, rows.clamp(min=0).mean(dim=1)).detach() / 3
    for method, found in maps.items():
        torch.testing.assert_close(found, expected[method])
        assert alive(found)


def feature_layer(visual: nn.Module) -> nn.Module:
    """The module of a stock tower whose output is read as a feature map; of a CLS-pooled one, the last block's norm."""
    if isinstance(visual, VisionTransformer):
        last = visual.transformer.resblocks[-1]
        return last.ln_1 if visual.attn_pool is None and visual.pool_type == "tok" else last
    trunk = visual.trunk
    for name, module in (("stem", "stages"), ("patch_embed", "norm")):
        if not hasattr(trunk, "blocks") and hasattr(trunk, name):
            return trunk.final_conv if hasattr(trunk, "final_conv") else (
                trunk.stages[-1] if module == "stages" else trunk.norm)
    if trunk.global_pool != "token":
        return trunk.norm
    post_norm = type(trunk.blocks[-1]).__name__ == "EvaBlockPostNorm"
    return trunk.blocks[-2] if post_norm else trunk.blocks[-1].norm1


def test_gradcam_is_the_mean_gradient_of_the_stock_tower(vlm):
    visual, kept = vlm.model.visual, []
    images, texts = tower_images(visual), tower_texts(vlm)
    maps = dealkit.explain(vlm, images, texts, method="gradcam")
    hook = feature_layer(visual).register_forward_hook(lambda module, args, output: kept.append(output))
    embedding = vlm.model.encode_image(images)
    hook.remove()
    for number, text in enumerate(texts):
        features, weights = kept[0], gradient(embedding, text, kept[0])[0]
        if features.ndim == 3:  # tokens
            prefix = features.shape[1] - vlm.grid[0] * vlm.grid[1]
            features, weights = (x[:, prefix:].mT.unflatten(2, vlm.grid) for x in (features, weights))
        elif FAMILY[vlm.name] == "Swin transformer":  # channels last
            features, weights = (x.movedim(3, 1) for x in (features, weights))
        expected = (features * weights.mean(dim=(2, 3), keepdim=True)).sum(dim=1).clamp(min=0)
        torch.testing.assert_close(maps[:, number], expected.detach())
    assert alive(maps)


def test_maps_are_differentiable_a_second_time(vlm):
    """A directional derivative of a loss on the maps against finite differences, for the first and the last weights."""
    visual = copy.deepcopy(vlm.model.visual)
    model = VLM("copy", ImageOnly(visual))
    images, texts = tower_images(visual), tower_texts(vlm, 2)
    blocks = blocks_of(visual)
    weights = [max(blocks[i].parameters(), key=lambda weight: weight.numel()) for i in (0, -1)]

    def loss(method):
        maps = dealkit.explain(model, images, texts, method=method, create_graph=True, signed=True)
        return (maps / maps.detach().norm()).square().sum()

    for method in model.tower.methods:
        maps_norm = dealkit.explain(model, images, texts, method=method, signed=True).norm()
        gradients = torch.autograd.grad(loss(method), weights)
        for weight, slope in zip(weights, gradients):
            step = 1e-5 * torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    weight.add_(sign * step)
                    maps = dealkit.explain(model, images, texts, method=method, signed=True)
                    ends.append((maps / maps_norm).square().sum())
                    weight.sub_(sign * step)
            expected = (ends[0] - ends[1]) / 2
            torch.testing.assert_close((slope * step).sum(), expected, rtol=1e-4, atol=1e-12)
            assert expected.abs() > 1e-10


@pytest.mark.parametrize("name", [name for name in NAMES if FAMILY[name] not in ("Swin transformer",)])
def test_gradient_checkpointing_changes_nothing(name):
    vlm = tiny_tower(name)
    images, texts, results = tower_images(vlm.model.visual), tower_texts(vlm, 2), []
    for enabled in (False, True):
        visual = copy.deepcopy(vlm.model.visual)
        visual.set_grad_checkpointing(enabled)
        model, weight = VLM("copy", ImageOnly(visual)), next(blocks_of(visual)[0].parameters())
        for method in model.tower.methods:
            maps = dealkit.explain(model, images, texts, method=method, create_graph=True)
            results.append(torch.autograd.grad(maps.square().sum(), weight)[0])
    half = len(results) // 2
    for plain, saved in zip(results[:half], results[half:]):
        torch.testing.assert_close(plain, saved)
        assert plain.abs().max() > 0


@pytest.mark.parametrize("name", ["SigLIP", "Perception Encoder", "EVA02", "ConvNeXt"])
def test_captum_agrees(name):
    vlm = tiny_tower(name)
    images, texts = tower_images(vlm.model.visual), tower_texts(vlm, 2)
    maps = attribute(vlm, images, texts, method="input_x_gradient")
    if "attention" in vlm.tower.cuts:
        torch.testing.assert_close(maps, dealkit.explain(vlm, images, texts, method="relevance"))
    assert maps.shape == (2, 2, *vlm.grid) and maps.max() > 0


@pytest.mark.parametrize("build, method", [
    (lambda: TimmViT(**BIRDS, class_token=False, global_pool="map"), "relevance"),
    (lambda: Eva(**BIRDS, **ROPE, global_pool="token"), "relevance"),
    (lambda: TimmViT(**BIRDS, class_token=False, global_pool="avg"), "gradcam")])
def test_deal_trains_other_towers_than_clips(build, method):
    """The regularisers alone reach the first block of towers pooled by attention, by CLS and by an average."""
    vlm, birds = bird_vlm(), Birdworld(n=4)
    vlm.model.visual = wrap(build(), size=(80, 80))
    wake(vlm.model.visual, None)
    assert vlm.tower.methods[0] == method and vlm.grid == (5, 5)
    batch = birds.batch(range(4))
    categories = [birds.categories[label] for label in batch["label"]]
    terms = DealObjective(vlm, BANK, DealConfig(lambda_disentangle=1.0, gamma_localize=1.0))(
        batch["image"], categories, categories, None)
    for name in ("disentangle", "localize"):
        weights = list(blocks_of(vlm.model.visual)[0].parameters())
        gradients = torch.autograd.grad(terms[name], weights, retain_graph=True)
        assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)
