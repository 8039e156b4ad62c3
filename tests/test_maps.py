"""Maps against independent computations, their second derivatives, and what they leave behind: nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from conftest import random_embeddings, random_images, tiny_resnet, tiny_vit

from dealkit import normalize
from dealkit.maps import VARIABLES, contributions, explain, normalize_maps, to_maps

TINY = {"relevance": tiny_vit, "gradcam on a ViT": tiny_vit, "gradeclip": tiny_vit, "legrad": tiny_vit,
        "every_exit": tiny_vit, "gradcam": tiny_resnet}
cases = pytest.mark.parametrize("case", TINY)


def explain_case(case, vlm, images, texts, **options):
    return explain(vlm, images, texts, method=case.split()[0], **options)


# ------------------------------------------------------------------------------------------- independent computations


def plain_relevance(vlm, images, text):
    """Attention relevance as a textbook has it: the whole tower by hand, every token, one full backward pass.

    Returns gradient x attention of the last block's CLS row, `[B, heads, h, w]`.
    """
    visual = vlm.model.visual
    x = visual.conv1(images).reshape(len(images), visual.conv1.out_channels, -1).permute(0, 2, 1)
    x = torch.cat([visual.class_embedding.expand(len(images), 1, -1), x], dim=1)
    x = visual.ln_pre(x + visual.positional_embedding)
    for block in visual.transformer.resblocks:
        heads, width = block.attn.num_heads, block.attn.embed_dim
        qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        q, k, v = qkv.reshape(len(x), -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        attention = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / (width // heads) ** 0.5, dim=-1)
        attention.retain_grad()
        read = torch.einsum("bhqk,bhkd->bqhd", attention, v).reshape(x.shape)
        x = x + block.attn.out_proj(read)
        x = x + block.mlp(block.ln_2(x))
    embedding = visual.ln_post(x)[:, 0] @ visual.proj
    torch.nn.functional.cosine_similarity(embedding, text[None]).sum().backward()
    vlm.model.zero_grad()
    return (attention.grad * attention)[:, :, 0, 1:].unflatten(-1, vlm.grid).detach()


@pytest.mark.parametrize("name", ["vit", "birdworld_random"])
def test_relevance_equals_a_full_backward_pass_per_text(name, request):
    vlm = request.getfixturevalue(name)
    images, texts = random_images(vlm), random_embeddings(vlm, 3)
    maps, signed = explain(vlm, images, texts), explain(vlm, images, texts, signed=True)
    for k in range(3):
        products = plain_relevance(vlm, images, texts[k])
        scale = products.abs().max().item()
        torch.testing.assert_close(maps[:, k], products.clamp(min=0).mean(dim=1), atol=1e-4 * scale, rtol=1e-3)
        torch.testing.assert_close(signed[:, k], products.mean(dim=1), atol=1e-4 * scale, rtol=1e-3)
    assert maps.shape == (2, 3, *vlm.grid) and (maps > 0).any() and (signed < 0).any()


def test_gradcam_equals_captums(rn50):
    images, texts = random_images(rn50), random_embeddings(rn50, 3)
    maps, signed = explain(rn50, images, texts), explain(rn50, images, texts, signed=True)
    captum = LayerGradCam(lambda x: F.normalize(rn50.model.encode_image(x), dim=-1) @ F.normalize(texts, dim=-1).T,
                          rn50.model.visual.layer4)
    for k in range(3):
        expected = captum.attribute(images, target=k)[:, 0].detach()
        scale = expected.abs().max().item()
        torch.testing.assert_close(signed[:, k], expected, atol=1e-4 * scale, rtol=1e-3)
        torch.testing.assert_close(maps[:, k], expected.relu(), atol=1e-4 * scale, rtol=1e-3)
    assert maps.shape == (2, 3, 7, 7) and (maps > 0).any() and (signed < 0).any()


def test_gradcam_on_a_vit_equals_a_hook_on_the_last_norm():
    vlm = tiny_vit()
    images, texts, kept = random_images(vlm), random_embeddings(vlm, 2), []
    handle = vlm.model.visual.transformer.resblocks[-1].ln_1.register_forward_hook(lambda m, i, out: kept.append(out))
    embedding = vlm.model.encode_image(images)
    handle.remove()
    for k in range(2):
        score = F.cosine_similarity(embedding, texts[k][None]).sum()
        gradient = torch.autograd.grad(score, kept[0], retain_graph=True)[0]
        weighted = (gradient[:, 1:].mean(dim=1, keepdim=True) * kept[0][:, 1:]).sum(dim=-1)
        expected = weighted.relu().unflatten(1, vlm.grid).detach()
        torch.testing.assert_close(explain(vlm, images, texts, method="gradcam")[:, k], expected)


def test_maps_read_at_an_earlier_block():
    vlm = tiny_vit(layers=2)
    images, texts = random_images(vlm), random_embeddings(vlm, 2)
    earlier = to_maps(contributions(vlm.tower.split(images, block=0), texts, vlm.grid, create_graph=True))
    assert earlier.shape == (2, 2, 4, 3) and earlier.max() > 0
    assert not torch.allclose(earlier, explain(vlm, images, texts))
    earlier.sum().backward()  # through the second derivative of the blocks behind the cut
    assert vlm.model.visual.transformer.resblocks[1].attn.in_proj_weight.grad.abs().max() > 0


# ------------------------------------------------------------------------------------------------ second derivatives


@cases
@pytest.mark.parametrize("signed", [False, True])
def test_second_derivatives_pass_finite_differences(case, signed):
    """The loss on the maps, moved along random directions in the space of all the tower's weights.

    The step is tiny because a ResNet has a kink at every ReLU; float64 leaves digits enough.
    """
    vlm = TINY[case]()
    images, texts = random_images(vlm), random_embeddings(vlm, 3)
    weights = list(vlm.model.visual.parameters())
    target = torch.rand(2, 3, *vlm.grid, dtype=torch.float64)

    def loss(create_graph):
        maps = explain_case(case, vlm, images, texts, create_graph=create_graph, signed=signed)
        return ((maps / scale - target) ** 2).sum()

    scale = explain_case(case, vlm, images, texts).max()
    gradients = torch.autograd.grad(loss(True), weights)
    for seed in range(3):
        torch.manual_seed(seed)
        direction = [torch.randn_like(w) * (w.abs().mean() + 0.01) for w in weights]
        expected = sum((g * d).sum() for g, d in zip(gradients, direction))
        step, values = 1e-8, []
        with torch.no_grad():
            for move in (step, -2 * step, step):  # forward, back, home
                for w, d in zip(weights, direction):
                    w.add_(d, alpha=move)
                values.append(loss(False))
        measured = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(measured, expected, rtol=1e-4, atol=1e-5)
        assert expected.abs() > 1e-2


@pytest.mark.parametrize("name", ["vit", "rn50"])
def test_a_loss_on_maps_reaches_every_block(name, request):
    vlm = request.getfixturevalue(name)
    maps = explain(vlm, random_images(vlm), random_embeddings(vlm, 3), create_graph=True)
    names, weights = zip(*vlm.model.visual.named_parameters())
    gradients = torch.autograd.grad(normalize_maps(maps).prod(dim=1).sum(), weights, allow_unused=True)
    reached = {n for n, g in zip(names, gradients) if g is not None and g.abs().max() > 0}
    first, last = {"vit": ("resblocks.0.", "resblocks.11."), "rn50": ("layer1.0.", "layer4.2.")}[name]
    assert "conv1.weight" in reached
    assert any(first in n for n in reached) and any(last in n for n in reached)
    assert len(reached) == {"vit": 152, "rn50": 174}[name], sorted(set(names) - reached)


@cases
def test_the_gradient_reaches_the_text_tower(case):
    vlm = TINY[case]()
    explain_case(case, vlm, random_images(vlm), ["red head", "blue wing"], create_graph=True).sum().backward()
    assert vlm.model.token_embedding.weight.grad.abs().max() > 0


@cases
def test_a_frozen_tower_has_maps_with_a_graph(case):
    vlm = TINY[case]()
    images = random_images(vlm)
    expected = explain_case(case, vlm, images, ["red head"])
    for parameter in vlm.model.visual.parameters():
        parameter.requires_grad_(False)
    maps = explain_case(case, vlm, images, ["red head"], create_graph=True)
    torch.testing.assert_close(maps.detach(), expected)
    maps.sum().backward()
    assert all(p.grad is None for p in vlm.model.visual.parameters())
    assert vlm.model.token_embedding.weight.grad.abs().max() > 0


@cases
def test_detached_maps_leave_a_training_graph_whole(case):
    """The variant with detached maps: a constant, made from the same split that carries the contrastive gradient."""
    vlm = TINY[case]()
    images, texts = random_images(vlm), random_embeddings(vlm, 2)
    split = vlm.tower.split(images, kind=VARIABLES[case.split()[0]])
    maps = to_maps(contributions(split, texts, vlm.grid, method=case.split()[0]))
    assert not maps.requires_grad
    torch.testing.assert_close(maps, explain_case(case, vlm, images, texts))
    split.head(split.variable).sum().backward()
    assert vlm.model.visual.conv1.weight.grad.abs().max() > 0


# -------------------------------------------------------------------------------------------- cost, and what is left


@pytest.mark.parametrize("name, layer", [("vit", "conv1"), ("rn50", "layer4")])
def test_one_trunk_pass_serves_all_texts(name, layer, request):
    vlm, calls = request.getfixturevalue(name), []
    handle = vlm.model.visual.get_submodule(layer).register_forward_hook(lambda *_: calls.append(1))
    explain(vlm, random_images(vlm, 1), random_embeddings(vlm, 6))
    handle.remove()
    assert len(calls) == 1


@cases
def test_nothing_is_left_behind(case):
    vlm = TINY[case]()
    vlm.model.visual.conv1.weight.requires_grad_(False)
    images = random_images(vlm)
    flags = [p.requires_grad for p in vlm.model.parameters()]
    maps = explain_case(case, vlm, images, ["red head", "blue wing"])
    assert not maps.requires_grad and not images.requires_grad
    assert all(p.grad is None for p in vlm.model.parameters())
    assert [p.requires_grad for p in vlm.model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in vlm.model.modules())
    graph = explain_case(case, vlm, images, ["red head", "blue wing"], create_graph=True)
    assert all(p.grad is None for p in vlm.model.parameters())
    torch.testing.assert_close(graph.detach(), maps)


@cases
def test_maps_where_gradients_are_switched_off(case):
    vlm = TINY[case]()
    images, texts = random_images(vlm), ["red head", "blue wing"]
    expected = explain_case(case, vlm, images, texts)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            torch.testing.assert_close(explain_case(case, vlm, images + 0, texts), expected)
            torch.testing.assert_close(explain_case(case, vlm, images + 0, vlm.encode_text(texts)), expected)
            with pytest.raises(ValueError, match="torch.no_grad"):
                explain_case(case, vlm, images, texts, create_graph=True)
        assert torch.is_grad_enabled()


def test_normalize_maps_is_the_shared_one():
    assert normalize_maps is normalize.normalize_maps
