"""Captum's methods behind explain's signature: each against a computation by hand."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import Occlusion
from conftest import random_embeddings, random_images, tiny_resnet, tiny_vit, tiny_vlm

from dealkit.attribution import METHODS, attribute
from dealkit.maps import explain

SMALL = {"steps": 4, "batch_size": 6}
cases = pytest.mark.parametrize("build, method", [
    (tiny_vit, "input_x_gradient"), (tiny_vit, "integrated_gradients"), (tiny_vit, "occlusion"),
    (tiny_resnet, "layer_gradcam"), (tiny_resnet, "input_x_gradient"), (tiny_resnet, "integrated_gradients"),
    (tiny_resnet, "occlusion")])


def score(vlm, images, text):
    return F.cosine_similarity(vlm.model.encode_image(images), text[None])


def on_grid(vlm, pixels):
    """The positive part of the sum over colours, averaged over each cell, with plain indexing."""
    values = pixels.sum(dim=1).clamp(min=0)
    h, w = vlm.grid
    return values.reshape(len(values), h, values.shape[1] // h, w, values.shape[2] // w).mean(dim=(2, 4))


def test_layer_gradcam_equals_explain():
    vlm = tiny_resnet()
    images, texts = random_images(vlm), random_embeddings(vlm, 3)
    maps = attribute(vlm, images, texts, method="layer_gradcam")
    torch.testing.assert_close(maps, explain(vlm, images, texts, method="gradcam"))
    assert maps.max() > 0


def test_input_x_gradient_on_the_attention_equals_relevance():
    vlm = tiny_vit()
    images, texts = random_images(vlm), random_embeddings(vlm, 3)
    maps = attribute(vlm, images, texts, method="input_x_gradient")
    torch.testing.assert_close(maps, explain(vlm, images, texts, method="relevance"))
    assert maps.max() > 0


def test_input_x_gradient_on_features():
    vlm = tiny_resnet()
    images, texts = random_images(vlm), random_embeddings(vlm, 1)
    features = vlm.tower.split(images).variable.detach().requires_grad_()
    F.cosine_similarity(vlm.model.visual.attnpool(features), texts).sum().backward()
    expected = (features * features.grad).sum(dim=1).clamp(min=0).detach()
    torch.testing.assert_close(attribute(vlm, images, texts, method="input_x_gradient")[:, 0], expected)


def test_integrated_gradients_equal_the_integral():
    """Gauss-Legendre points between the mean colour and the image; the shares add up to the difference in score."""
    vlm = tiny_vit()
    images, texts = random_images(vlm), random_embeddings(vlm, 1)
    nodes, weights = np.polynomial.legendre.leggauss(16)
    total = torch.zeros_like(images)
    for node, weight in zip((nodes + 1) / 2, weights / 2):
        point = (node * images).requires_grad_()
        total += weight * torch.autograd.grad(score(vlm, point, texts[0]).sum(), point)[0]
    shares = total * images
    gained = score(vlm, images, texts[0]) - score(vlm, 0 * images, texts[0])
    torch.testing.assert_close(shares.sum(dim=(1, 2, 3)), gained, atol=1e-2, rtol=0)
    maps = attribute(vlm, images, texts, method="integrated_gradients", steps=16)
    torch.testing.assert_close(maps[:, 0], on_grid(vlm, shares).detach())


def test_occlusion_equals_covering_each_cell():
    vlm = tiny_vit()
    images, texts = random_images(vlm), random_embeddings(vlm, 1)
    expected = torch.zeros(2, 1, *vlm.grid, dtype=torch.float64)
    with torch.no_grad():
        for i in range(4):
            for j in range(3):
                covered = images.clone()
                covered[:, :, 8 * i:8 * i + 8, 8 * j:8 * j + 8] = 0
                expected[:, 0, i, j] = score(vlm, images, texts[0]) - score(vlm, covered, texts[0])
    maps = attribute(vlm, images, texts, method="occlusion", **SMALL)
    torch.testing.assert_close(maps, expected.relu())
    assert maps.max() > 1e-3


@pytest.mark.parametrize("build", [tiny_vit, tiny_resnet])
def test_occlusion_equals_captums_for_one_text_at_a_time(build):
    vlm = build()
    images, texts = random_images(vlm), random_embeddings(vlm, 2, 3)
    maps = attribute(vlm, images, texts, method="occlusion", **SMALL)
    cell = (3, images.shape[2] // vlm.grid[0], images.shape[3] // vlm.grid[1])
    captum = Occlusion(lambda x, text: F.cosine_similarity(vlm.model.encode_image(x), text))
    for k in range(3):
        drops = captum.attribute(images, additional_forward_args=texts[:, k], sliding_window_shapes=cell, strides=cell)
        expected = drops[:, 0, ::cell[1], ::cell[2]].relu()
        torch.testing.assert_close(maps[:, k], expected, atol=1e-6, rtol=1e-4, check_dtype=False)  # float32 in Captum
        assert expected.max() > 1e-3


def test_occlusion_shows_each_covered_image_to_all_texts():
    vlm, passes = tiny_vit(), []
    handle = vlm.model.visual.conv1.register_forward_hook(lambda module, args, out: passes.append(len(out)))
    attribute(vlm, random_images(vlm, 3), random_embeddings(vlm, 5), method="occlusion", batch_size=7)
    handle.remove()
    assert sum(passes) == 3 * (1 + 4 * 3) and max(passes) <= 7


@cases
def test_the_batch_size_does_not_matter_and_texts_may_differ_by_image(build, method):
    vlm = build()
    images, texts = random_images(vlm, 3), random_embeddings(vlm, 3, 2)
    maps = attribute(vlm, images, texts, method=method, steps=4, batch_size=64)
    torch.testing.assert_close(attribute(vlm, images, texts, method=method, steps=4, batch_size=2), maps)
    for i in range(3):
        torch.testing.assert_close(attribute(vlm, images[i:i + 1], texts[i], method=method, **SMALL)[0], maps[i])


@cases
def test_nothing_is_left_behind(build, method):
    vlm = build()
    images = random_images(vlm)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        maps = attribute(vlm, images, ["red head", "blue wing"], method=method, **SMALL)
    assert maps.shape == (2, 2, *vlm.grid) and maps.min() >= 0 and not maps.requires_grad
    assert not images.requires_grad and all(p.grad is None and p.requires_grad for p in vlm.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in vlm.model.modules())


@cases
def test_maps_where_gradients_are_switched_off(build, method):
    """Images and texts that were made in inference mode can have no gradient; the maps are the same all the same."""
    vlm = build()
    images, texts = random_images(vlm), ["red head", "blue wing"]
    expected = attribute(vlm, images, texts, method=method, **SMALL)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            for form in (texts, vlm.encode_text(texts)):
                torch.testing.assert_close(attribute(vlm, images + 0, form, method=method, **SMALL), expected)


def test_a_progress_bar_is_there_when_asked_for(capsys):
    vlm = tiny_vit()
    attribute(vlm, random_images(vlm), ["red"], method="occlusion", **SMALL)
    assert capsys.readouterr().err == ""
    attribute(vlm, random_images(vlm), ["red"], method="occlusion", progress=True, **SMALL)
    assert "occlusion: 100%" in capsys.readouterr().err


def test_bad_input():
    vlm = tiny_vit()
    images = random_images(vlm)
    with pytest.raises(ValueError, match=f"unknown method 'magic'.*{', '.join(METHODS)}"):
        attribute(vlm, images, ["red"], method="magic")
    with pytest.raises(ValueError, match="this tower, CLS-pooled ViT, does not have.*method='gradcam'"):
        attribute(vlm, images, ["red"], method="layer_gradcam")
    for options in ({"steps": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            attribute(vlm, images, ["red"], **options)
    with pytest.raises(TypeError, match="put it in a list"):
        attribute(vlm, images, "red")
    with pytest.raises(ValueError, match="empty batch"):
        attribute(vlm, images[:0], ["red"])
    unsupported = tiny_vlm(layers=1, width=16, head_width=8, patch_size=8, image_size=16, pool_type="none")
    for method in METHODS:
        with pytest.raises(NotImplementedError, match="ViT without pooling"):
            attribute(unsupported, random_images(unsupported), ["red"], method=method)
