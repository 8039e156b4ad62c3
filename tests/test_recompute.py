"""Activation checkpointing: the same gradients, with less kept, and switches that come back."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_resnet, tiny_vit, tiny_vlm
from tiny_birds import BANK, bird_resnet, bird_vlm, same, weights
from tiny_towers import tiny_tower

from dealkit import DealConfig, finetune
from dealkit.datasets import Birdworld
from dealkit.models import VLM
from dealkit.training import DealObjective, draw_captions

DEAL = DealConfig(lambda_disentangle=.7, gamma_localize=.1, overlap="cosine", aggregate="max", guard=.4, lr=1e-3,
                  batch_size=8)
TOWERS = [("vit", "relevance"), ("vit", "gradcam"), ("vit", "gradeclip"), ("vit", "legrad"),
          ("vit", "every_exit"), ("resnet", "gradcam")]


def backward(vlm: VLM, **changes) -> tuple[dict[str, torch.Tensor], int]:
    """One backward pass of DEAL -> gradients, and the bytes that autograd kept for it outside of the blocks."""
    config, kept = replace(DEAL, **changes), {}
    batch = Birdworld(n=6, size=vlm.image_size[0]).batch(range(6))
    categories = [Birdworld.categories[y] for y in batch["label"]]
    captions, true = draw_captions(categories, BANK, config, np.random.default_rng(0))

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in vlm.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = DealObjective(vlm, BANK, config)(batch["image"], categories, captions, true)
        terms["total"].backward()
    gradients = {name: p.grad.clone() for name, p in vlm.model.named_parameters() if p.grad is not None}
    vlm.model.zero_grad()
    return gradients, sum(size for place, size in kept.items() if place not in own)


@pytest.mark.parametrize("tower, method", TOWERS)
def test_recomputing_gives_the_same_gradients_and_keeps_less(tower, method):
    vlm = (bird_resnet if tower == "resnet" else bird_vlm)(0, torch.float64)
    before = [getattr(part, "grad_checkpointing", None) for part in vlm.model.modules()]
    expected, kept = backward(vlm, method=method)
    recomputed, less = backward(vlm, method=method, checkpoint_activations=True)
    assert recomputed.keys() == expected.keys()
    for name, value in expected.items():
        assert (recomputed[name] - value).abs().max() <= 1e-6 * value.abs().max() + 1e-14, name
    assert less < .7 * kept, (less, kept)
    assert before == [getattr(part, "grad_checkpointing", None) for part in vlm.model.modules()]


def count_runs(vlm: VLM, blocks, **changes) -> int:
    calls = []
    handles = [block.register_forward_pre_hook(lambda *_: calls.append(1)) for block in blocks]
    backward(vlm, **changes)
    for handle in handles:
        handle.remove()
    return len(calls)


def test_blocks_of_both_towers_run_twice():
    """The last image block is taken apart by the cut, and is not recomputed."""
    vlm, resnet = bird_vlm(), bird_resnet()
    image, text = list(vlm.model.visual.transformer.resblocks)[:-1], list(vlm.model.transformer.resblocks)
    stages = [resnet.model.visual.layer1[0], resnet.model.visual.layer4[0]]
    for model, blocks in ((vlm, image), (vlm, text), (resnet, stages)):
        assert count_runs(model, blocks) == len(blocks)
        assert count_runs(model, blocks, checkpoint_activations=True) == 2 * len(blocks)


@pytest.mark.parametrize("name", ["custom blocks", "CoCa", "timm", "EVA02", "SigLIP", "timm, average", "ConvNeXt",
                                  "Swin"])
def test_other_towers_recompute_too(name):
    vlm = tiny_tower(name)
    images = torch.randn(2, 3, *vlm.image_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for save_memory in (False, True):
        split = vlm.tower.split(images, save_memory=save_memory)
        inner = torch.autograd.grad(split.head(split.variable)[:, 0].sum(), split.variable, create_graph=True)[0]
        (inner * split.variable).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in vlm.model.named_parameters() if p.grad is not None})
        vlm.model.zero_grad()
    assert found[0].keys() == found[1].keys()
    for weight, value in found[0].items():
        assert (found[1][weight] - value).abs().max() <= 1e-6 * value.abs().max() + 1e-14, weight


def test_a_user_who_switched_it_on_keeps_it_on():
    vlm = bird_vlm()
    vlm.model.set_grad_checkpointing(True)
    finetune(vlm, Birdworld(n=8), BANK, replace(DEAL, checkpoint_activations=True), progress=False)
    assert vlm.model.visual.transformer.grad_checkpointing and vlm.model.transformer.grad_checkpointing


def test_a_run_that_recomputes_is_the_run_that_does_not():
    one, other = bird_vlm(), bird_vlm()
    table = finetune(one, Birdworld(n=16), BANK, DEAL, progress=False)
    again = finetune(other, Birdworld(n=16), BANK, replace(DEAL, checkpoint_activations=True), progress=False)
    assert np.allclose(table, again, rtol=1e-5)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=1e-4, atol=1e-6)
    assert not same(weights(one), weights(bird_vlm()))


@pytest.mark.parametrize("build", [tiny_vit, tiny_resnet])
def test_a_split_without_gradients_recomputes_nothing(build):
    vlm = build()
    images = torch.zeros(1, 3, *vlm.image_size, dtype=torch.float64)
    with torch.no_grad():
        split = vlm.tower.split(images, save_memory=True)
    assert not split.variable.requires_grad


def test_a_tower_without_a_switch_is_refused():
    vlm = tiny_vlm(layers=2, width=32, head_width=8, patch_size=8, image_size=(32, 24))
    del vlm.model.visual.transformer.grad_checkpointing                  # as in FLAVA's
    with pytest.raises(ValueError, match="VisionTransformer cannot be recomputed.*smaller batch_size"):
        DealObjective(vlm, BANK, replace(DEAL, checkpoint_activations=True))
