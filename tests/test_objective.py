"""The config and the objective: what every term is, and which weights it trains."""
from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from tiny_birds import BANK, bird_resnet, bird_vlm

from dealkit import DealConfig, explain
from dealkit.datasets import Birdworld
from dealkit.losses import contrastive_loss, disentangle_loss, guard_loss, localize_loss
from dealkit.training import DealObjective, draw_captions

DEAL = DealConfig(lambda_disentangle=.7, gamma_localize=.1, overlap="cosine", aggregate="max", guard=.4, lr=1e-3,
                  batch_size=8)
REGULARISERS = ("disentangle", "localize", "guard")


def one_batch(vlm, config=DEAL, n=6, size=80):
    """Objective, images, categories, captions and truth, as the loop passes them on."""
    batch = Birdworld(n=n, size=size).batch(range(n))
    categories = [Birdworld.categories[y] for y in batch["label"]]
    captions, true = draw_captions(categories, BANK, config, np.random.default_rng(0))
    return DealObjective(vlm, BANK, config), (batch["image"], categories, captions, true)


# ---------------------------------------------------------------------------------------------------------- the config


@pytest.mark.parametrize("bad, word", [
    *(({name: value}, name) for name in ("lambda_disentangle", "gamma_localize", "guard", "weight_decay")
      for value in (-1e-9, float("nan"), float("inf"))),
    *(({"lr": value}, "lr") for value in (0., -1e-4, float("nan"), float("inf"))),
    ({"overlap": "dice"}, "product"), ({"aggregate": "mean"}, "sum"), ({"batch_size": 1}, "batch_size"),
    ({"batch_size": 2.5}, "batch_size"), ({"epochs": 0}, "epochs"), ({"epochs": 1.5}, "epochs"), ({"seed": -1}, "seed"),
    ({"guard_share": 1.1}, "guard_share"), ({"guard_share": float("nan")}, "guard_share"),
    ({"concept_captions": -.1}, "concept_captions"), ({"category_prompt": "a bird"}, "category_prompt"),
])
def test_a_config_names_what_is_wrong_with_it(bad, word):
    with pytest.raises(ValueError, match=word):
        DealConfig(**bad)


def test_the_defaults_are_the_papers_and_zero_weights_are_legal():
    config = DealConfig()
    assert (config.lambda_disentangle, config.gamma_localize, config.lr) == (.1, .01, 5e-7)
    assert (config.overlap, config.aggregate, config.guard, config.betas) == ("product", "sum", 0., (.9, .98))
    control = DEAL.contrastive_only
    assert (control.lambda_disentangle, control.gamma_localize, control.guard) == (0., 0., 0.)
    changed = {name for name, value in asdict(control).items() if value != asdict(DEAL)[name]}
    assert changed == {"lambda_disentangle", "gamma_localize", "guard"}


@pytest.mark.parametrize("name", ["lr", "lambda_disentangle"])
def test_a_number_in_quotes_is_named(name):
    with pytest.raises(ValueError, match=f"{name} is '1e-4'"):
        replace(DEAL, **{name: "1e-4"})


# ----------------------------------------------------------------------------------------------------------- the terms


@pytest.mark.parametrize("method, overlap, aggregate", [("relevance", "cosine", "max"), ("relevance", "product", "sum"),
                                                        ("gradcam", "product", "max"),
                                                        ("gradeclip", "cosine", "max"), ("legrad", "product", "sum")])
def test_every_term_is_what_the_public_functions_say(method, overlap, aggregate):
    """The maps are those of each image's own concepts, explained one image at a time."""
    vlm = bird_vlm()
    config = replace(DEAL, method=method, overlap=overlap, aggregate=aggregate, guard_share=.9)
    objective, (images, categories, captions, true) = one_batch(vlm, config)
    terms = objective(images, categories, captions, true)
    assert set(terms) == {"contrastive", *REGULARISERS, "total", "dead_maps"}
    texts = [[*BANK[category], f"a photo of a {category}"] for category in categories]
    maps = torch.cat([explain(vlm, image[None], row, method) for image, row in zip(images, texts)])
    expected = {
        "contrastive": contrastive_loss(vlm.encode_image(images), vlm.encode_text(captions), vlm.logit_scale, true),
        "disentangle": disentangle_loss(maps[:, :5], overlap),
        "localize": localize_loss(maps[:, :5], maps[:, 5], aggregate),
        "dead_maps": (maps.amax(dim=(2, 3)) == 0).float().mean(),
    }
    for name, value in expected.items():
        assert torch.allclose(terms[name], value, rtol=1e-4, atol=1e-6), name
    total = terms["contrastive"] + sum(weight * terms[name] for name, weight in zip(
        REGULARISERS, (config.lambda_disentangle, config.gamma_localize, config.guard)))
    assert torch.allclose(terms["total"], total, rtol=1e-6)
    if method in ("gradcam", "gradeclip"):                               # one head: the guard sees the signed maps
        signed = torch.cat([explain(vlm, i[None], row, method, signed=True) for i, row in zip(images, texts)])
        assert torch.allclose(terms["guard"], guard_loss(signed, .9), rtol=1e-4)


def vision_parameters(vlm):
    """Weights of the first block, and weights of the last one that its maps depend on."""
    visual = vlm.model.visual
    if hasattr(visual, "layer1"):
        return list(visual.layer1[0].parameters()), list(visual.layer4[-1].parameters())
    return [list(visual.transformer.resblocks[i].parameters()) for i in (0, -1)]


def moved(term, parameters) -> float:
    gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return sum(float(g.abs().sum()) for g in gradients if g is not None)


@pytest.mark.parametrize("term", REGULARISERS)
@pytest.mark.parametrize("overlap, aggregate", [("product", "sum"), ("cosine", "max")])
@pytest.mark.parametrize("tower", ["vit", "vit gradcam", "vit gradeclip", "vit legrad", "resnet"])
def test_every_term_alone_trains_the_first_and_the_last_block(term, overlap, aggregate, tower):
    vlm = bird_resnet() if tower == "resnet" else bird_vlm()
    config = replace(DEAL, overlap=overlap, aggregate=aggregate, guard_share=1.,
                     method=tower.split()[1] if " " in tower else None)
    objective, batch = one_batch(vlm, config, size=vlm.image_size[0])
    terms = objective(*batch)
    for block in vision_parameters(vlm):
        assert moved(terms[term], block) > 1e-7
    text = list(vlm.model.transformer.parameters())
    assert moved(terms[term], text) > 1e-7                               # it moves the text tower, unless told not to
    terms = DealObjective(vlm, BANK, replace(config, stop_text_gradient=True))(*batch)
    assert moved(terms[term], [*text, *vlm.model.token_embedding.parameters(), vlm.model.text_projection]) == 0
    assert moved(terms[term], vision_parameters(vlm)[0]) > 1e-7 and moved(terms["contrastive"], text) > 1e-7


@pytest.mark.parametrize("method", ["relevance", "gradcam", "gradeclip", "legrad"])
def test_the_embedding_and_all_maps_come_from_one_pass_through_the_trunk(method):
    vlm, calls = bird_vlm(), []
    objective, batch = one_batch(vlm, replace(DEAL, method=method))
    blocks = [vlm.model.visual.conv1, *(block.ln_1 for block in vlm.model.visual.transformer.resblocks)]
    handles = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in blocks]
    objective(*batch)["total"].backward()
    for handle in handles:
        handle.remove()
    assert len(calls) == len(blocks)


@pytest.mark.parametrize("config", [replace(DEAL, detach_maps=True), DEAL.contrastive_only])
def test_maps_without_a_gradient_are_still_reported(config):
    vlm = bird_vlm()
    objective, batch = one_batch(vlm, config)
    terms, reference = objective(*batch), DealObjective(vlm, BANK, DEAL)(*batch)
    for name in REGULARISERS:
        assert not terms[name].requires_grad
        assert torch.allclose(terms[name], reference[name], rtol=1e-5)


def test_the_gradient_is_the_same_on_every_run_with_several_threads():
    """Where rows of text embeddings are shared by many images, their gradients must be added up in a fixed order."""
    vlm, threads = bird_vlm(), torch.get_num_threads()
    objective, batch = one_batch(vlm, n=320)
    torch.set_num_threads(4)
    try:
        seen = set()
        for _ in range(4):
            vlm.model.zero_grad()
            objective(*batch)["disentangle"].backward()
            seen.add(vlm.model.token_embedding.weight.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1
