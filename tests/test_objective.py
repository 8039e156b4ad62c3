"""The config and the objective: what every term is, and which weights it trains."""
from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from tiny_birds import BANK, bird_resnet, bird_vlm

from dealkit import ConceptBank, DealConfig, explain
from dealkit.datasets import Birdworld
from dealkit.losses import contrastive_loss, disentangle_loss, guard_loss, localize_loss
from dealkit.maps import VARIABLES, contributions, to_maps
from dealkit.presets import BIRDWORLD, BIRDWORLD_RECOMMENDED
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
    ({"overlap": "iou"}, "soft_iou"), ({"localize_moves": "none"}, "'both', 'concepts', 'category'"),
    ({"n_concepts": 1}, "n_concepts is 1; it must be a whole number >= 2"), ({"n_concepts": 2.5}, "n_concepts is 2.5"),
    *(({name: value}, f"{name} is .* > 0, or None for a fixed weight") for name in (
        "limit_disentangle", "limit_localize") for value in (0., -1., float("nan"), float("inf"), "1")),
    *(({"multiplier_rate": value}, "multiplier_rate is .* > 0$") for value in (0., -1., None)),
    *(({name: value}, rf"{name} is .*; a share lies in \[0, 1\]") for name in ("swap", "swap_keep")
      for value in (-.1, 1.1, float("nan"))),
])
def test_a_config_names_what_is_wrong_with_it(bad, word):
    with pytest.raises(ValueError, match=word):
        DealConfig(**bad)


def test_the_defaults_are_the_papers_and_zero_weights_are_legal():
    config = DealConfig()
    assert (config.lambda_disentangle, config.gamma_localize, config.lr) == (.1, .01, 5e-7)
    assert (config.overlap, config.aggregate, config.guard, config.betas) == ("product", "sum", 0., (.9, .98))
    assert (config.localize_moves, config.n_concepts, config.swap) == ("both", None, 0.)
    assert config.limit_disentangle is config.limit_localize is None
    control = DEAL.contrastive_only
    assert (control.lambda_disentangle, control.gamma_localize, control.guard) == (0., 0., 0.)
    changed = {name for name, value in asdict(control).items() if value != asdict(DEAL)[name]}
    assert changed == {"lambda_disentangle", "gamma_localize", "guard"}


def test_the_control_has_no_swap_and_no_limit_and_keeps_everything_else():
    full = replace(DEAL, swap=.5, swap_method="centre", limit_disentangle=.1, limit_localize=2., n_concepts=3)
    control = full.contrastive_only
    changed = {name: value for name, value in asdict(control).items() if value != asdict(full)[name]}
    assert changed == {"lambda_disentangle": 0., "gamma_localize": 0., "guard": 0., "swap": 0.,
                       "limit_disentangle": None, "limit_localize": None}
    assert full.regularised and not control.regularised
    for name in ("lambda_disentangle", "gamma_localize", "guard", "limit_disentangle", "limit_localize"):
        assert replace(control, **{name: .1}).regularised, name            # a weight that starts at 0 may rise
    assert not replace(control, swap=1.).regularised


def test_the_recommended_config_is_birdworlds_and_takes_changes():
    config = DealConfig.recommended(lr=1e-4, batch_size=24)
    assert config == BIRDWORLD_RECOMMENDED and replace(config, swap=0.) == BIRDWORLD and config.swap > 0
    assert DealConfig.recommended().lr == DealConfig().lr and DealConfig.recommended(swap=.25).swap == .25


@pytest.mark.parametrize("name", ["lr", "lambda_disentangle"])
def test_a_number_in_quotes_is_named(name):
    with pytest.raises(ValueError, match=f"{name} is '1e-4'"):
        replace(DEAL, **{name: "1e-4"})


# ----------------------------------------------------------------------------------------------------------- the terms


@pytest.mark.parametrize("method, overlap, aggregate", [("relevance", "cosine", "max"), ("relevance", "product", "sum"),
                                                        ("gradcam", "product", "max"),
                                                        ("gradeclip", "cosine", "max"), ("legrad", "product", "sum"),
                                                        ("every_exit", "soft_iou", "max")])
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
@pytest.mark.parametrize("overlap, aggregate", [("product", "sum"), ("cosine", "max"), ("soft_iou", "max")])
@pytest.mark.parametrize("tower", ["vit", "vit gradcam", "vit gradeclip", "vit legrad", "vit every_exit", "resnet"])
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


@pytest.mark.parametrize("moves", ["both", "concepts", "category"])
@pytest.mark.parametrize("method", ["relevance", "every_exit"])
def test_the_localizing_term_moves_the_maps_that_the_config_names(moves, method):
    """Its gradient is that with the other maps as constants; its value, and the other terms, are as ever."""
    vlm = bird_vlm(dtype=torch.float64)
    config = replace(DEAL, localize_moves=moves, method=method)
    objective, (images, categories, captions, true) = one_batch(vlm, config)
    images, parameters = images.double(), [p for p in vlm.model.parameters() if p.requires_grad]
    terms = objective(images, categories, captions, true)
    found = torch.autograd.grad(terms["localize"], parameters, allow_unused=True, retain_graph=True)
    emb = torch.stack([vlm.encode_text([*BANK[c], f"a photo of a {c}"]) for c in categories])
    split = vlm.tower.split(images, kind=VARIABLES[method])
    maps = to_maps(contributions(split, emb, vlm.grid, create_graph=True, method=method))
    concepts, category = maps.split([5, 1], dim=1)
    constant = {"both": (concepts, category), "concepts": (concepts, category.data),
                "category": (concepts.data, category)}
    expected = localize_loss(constant[moves][0], constant[moves][1][:, 0], "max")
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True, retain_graph=True)
    torch.testing.assert_close(terms["localize"], expected)
    whole = torch.autograd.grad(localize_loss(concepts, category[:, 0], "max"), parameters, allow_unused=True)
    assert sum(g is not None for g in wanted) > 20
    for one, other in zip(found, wanted):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)
    differ = any(g is not None and not torch.allclose(g, w, rtol=1e-3) for g, w in zip(found, whole))
    assert differ == (moves != "both")
    reference = DealObjective(vlm, BANK, replace(config, localize_moves="both"))(images, categories, captions, true)
    weight = parameters[1]
    for name in ("disentangle", "guard", "contrastive"):
        torch.testing.assert_close(*(torch.autograd.grad(t[name], weight, retain_graph=True, allow_unused=True)
                                     for t in (terms, reference)))


def test_the_regularisers_explain_the_first_concepts_where_fewer_are_asked_for():
    vlm = bird_vlm()
    objective, batch = one_batch(vlm, replace(DEAL, n_concepts=3))
    short = ConceptBank("short", {category: concepts[:3] for category, concepts in BANK.items()})
    expected = DealObjective(vlm, short, DEAL)(*batch)
    terms, whole = objective(*batch), DealObjective(vlm, BANK, DEAL)(*batch)
    for name in ("contrastive", *REGULARISERS):
        assert torch.allclose(terms[name], expected[name], rtol=1e-5), name
    assert not torch.allclose(terms["disentangle"], whole["disentangle"], rtol=1e-3)
    every = DealObjective(vlm, BANK, replace(DEAL, n_concepts=5))(*batch)
    assert torch.equal(every["total"], whole["total"])
    with pytest.raises(ValueError, match="n_concepts is 6, and the shortest list of the bank has 5; .*ask for fewer"):
        DealObjective(vlm, BANK, replace(DEAL, n_concepts=6))


def test_a_method_of_the_swap_that_there_is_not_stops_before_any_step():
    with pytest.raises(ValueError, match="unknown method 'magic'; this tower"):
        DealObjective(bird_vlm(), BANK, replace(DEAL, swap=.5, swap_method="magic"))
    with pytest.raises(ValueError, match="'every_exit' does not apply to this tower, ModifiedResNet; it has gradcam"):
        DealObjective(bird_resnet(), BANK, replace(DEAL, swap_method="every_exit"))


@pytest.mark.parametrize("method", ["relevance", "gradcam", "gradeclip", "legrad", "every_exit"])
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
