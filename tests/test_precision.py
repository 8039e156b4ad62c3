"""Autocast over float32 weights: maps, losses and weights stay right, and float16 says what it leaves out."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_resnet
from tiny_birds import BANK, bird_vlm, same, weights

from dealkit import DealConfig, finetune
from dealkit.datasets import Birdworld
from dealkit.maps import VARIABLES, contributions, to_maps
from dealkit.training import DealObjective, draw_captions
from dealkit.training.precision import autocast, in_float32

DEAL = DealConfig(lambda_disentangle=.7, gamma_localize=.1, overlap="cosine", aggregate="max", guard=.4, lr=1e-3,
                  batch_size=8)
HALVES = ["bfloat16", "float16"]


def maps_in(precision: str, vlm, method: str, images, text_emb):
    with autocast(vlm.device, precision):
        split = vlm.tower.split(images, kind=VARIABLES[method])
    split = in_float32(split, precision)
    return F.normalize(split.head(split.variable), dim=-1), to_maps(
        contributions(split, text_emb, vlm.grid, True, method))


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("method", ["relevance", "gradcam", "gradeclip", "legrad", "every_exit"])
def test_maps_and_embeddings_under_autocast_are_those_of_float32(precision, method):
    vlm = bird_vlm()
    images = Birdworld(n=8).batch(range(8))["image"]
    text_emb = vlm.encode_text(["red head", "blue wing", "a photo of a zorvit"]).detach()
    embeddings, expected = maps_in("float32", vlm, method, images, text_emb)
    halved, maps = maps_in(precision, vlm, method, images, text_emb)
    assert maps.dtype == halved.dtype == torch.float32
    assert not torch.equal(halved, embeddings)                           # it was computed in another precision
    assert (halved * embeddings).sum(dim=-1).min() > .999
    cosine = F.cosine_similarity(maps.flatten(2), expected.flatten(2), dim=-1)
    assert cosine.min() > .99
    assert (maps.sum() / expected.sum() - 1).abs() < .02                 # the unit is the same too
    maps.square().sum().backward()
    gradient = vlm.model.visual.conv1.weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("precision", HALVES)
def test_signed_maps_of_a_resnet_under_autocast(precision):
    """Signed: what a ReLU leaves of a sum that nearly cancels is decided by its last bits."""
    vlm = tiny_resnet(torch.float32)
    images = torch.randn(6, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    text_emb = F.normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(1)), dim=-1)
    maps = []
    for name in ("float32", precision):
        with autocast(vlm.device, name):
            split = vlm.tower.split(images)
        maps.append(contributions(in_float32(split, name), text_emb, vlm.grid)[:, :, 0])
    assert F.cosine_similarity(*(m.flatten() for m in maps), dim=0) > .99


def test_small_gradients_survive_float16():
    """A head whose gradient lies below what float16 resolves: without the gain its map is empty."""
    vlm = bird_vlm()
    with torch.no_grad():                                                # what is read counts for little in the stream
        vlm.model.visual.transformer.resblocks[-1].attn.out_proj.weight.mul_(1e-4)
        vlm.model.visual.ln_pre.weight.mul_(300.)
    images = Birdworld(n=4).batch(range(4))["image"]
    text_emb = vlm.encode_text(["red head", "blue wing"]).detach()
    expected = maps_in("float32", vlm, "relevance", images, text_emb)[1]
    assert 0 < expected.max() < 1e-6
    maps = maps_in("float16", vlm, "relevance", images, text_emb)[1]
    assert F.cosine_similarity(*(1e9 * m.flatten(1) for m in (maps, expected))).min() > .99
    with autocast(vlm.device, "float16"):
        split = in_float32(vlm.tower.split(images), "float16")
    without = to_maps(contributions(replace(split, gain=1.), text_emb, vlm.grid))
    assert F.cosine_similarity(*(1e9 * m.flatten(1) for m in (without, expected))).min() < .9


def gradients(precision: str):
    vlm, config = bird_vlm(), replace(DEAL, precision=precision)
    batch = Birdworld(n=8).batch(range(8))
    categories = [Birdworld.categories[y] for y in batch["label"]]
    captions, true = draw_captions(categories, BANK, config, np.random.default_rng(0))
    terms = DealObjective(vlm, BANK, config)(batch["image"], categories, captions, true)
    terms["total"].backward()
    return terms, torch.cat([p.grad.flatten() for p in vlm.model.parameters()])


def test_terms_and_gradients_in_bfloat16_are_close_to_those_of_float32():
    expected, reference = gradients("float32")
    terms, gradient = gradients("bfloat16")
    assert all(value.dtype == torch.float32 for value in terms.values())
    assert all(torch.allclose(terms[name], value, rtol=.02, atol=.01) for name, value in expected.items())
    assert F.cosine_similarity(gradient, reference, dim=0) > .99


@pytest.mark.parametrize("precision", HALVES)
def test_a_run_in_half_precision_trains_float32_weights(precision):
    runs = {}
    for name in ("float32", precision):
        vlm = bird_vlm()
        config = replace(DEAL, precision=name, batch_size=4)
        runs[name] = finetune(vlm, Birdworld(n=24), BANK, config, progress=False)
        assert {p.dtype for p in vlm.model.parameters()} == {torch.float32}
    half, full = runs[precision], runs["float32"]
    assert np.allclose(half.contrastive[0], full.contrastive[0], rtol=.01)
    if precision == "bfloat16":                                          # no step was left out: the same way down
        assert np.allclose(half.total, full.total, rtol=.03)
    assert ("skipped" in half.columns) == (precision == "float16") and "skipped" not in full.columns


def test_steps_that_overflow_in_float16_are_counted_and_leave_the_weights_alone():
    """The scale starts too high for these gradients: it halves until they fit."""
    vlm, seen = bird_vlm(), []
    before = weights(vlm)
    config = replace(DEAL, precision="float16", batch_size=2)
    table = finetune(vlm, Birdworld(n=16), BANK, config, progress=False,
                     callback=lambda row: seen.append((row["skipped"], same(weights(vlm), before))))
    skipped = [bool(s) for s, _ in seen]
    assert table.skipped.astype(bool).tolist() == skipped and skipped[0] and not skipped[-1]
    first = skipped.index(False)
    assert [unmoved for _, unmoved in seen] == [True] * first + [False] * (len(seen) - first)


def test_a_gradient_that_fits_at_no_scale_is_an_error():
    vlm = bird_vlm()
    vlm.model.visual.proj.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match="step 16: .*'visual.proj' is not finite.*precision='bfloat16'"):
        finetune(vlm, Birdworld(n=4), BANK, replace(DEAL.contrastive_only, precision="float16", batch_size=2,
                                                              epochs=10), progress=False)
    assert same(weights(vlm), weights(bird_vlm()))


@pytest.mark.filterwarnings("ignore:the run in .* began with other weights")
def test_float16_resumes_with_its_scale(tmp_path):
    config = replace(DEAL, precision="float16", lambda_disentangle=100., epochs=4, batch_size=2)

    def run(vlm, **options):
        return finetune(vlm, Birdworld(n=4), BANK, config, progress=False, **options)

    class Stop(Exception):
        pass

    def stop(row):
        if row["step"] == 4:
            raise Stop

    whole, resumed = bird_vlm(), bird_vlm(seed=5)
    table = run(whole)
    assert table.skipped[0] == 1
    with pytest.raises(Stop):
        run(bird_vlm(), out_dir=tmp_path, save_every=3, callback=stop)
    assert run(resumed, out_dir=tmp_path, resume=True).equals(table)
    assert same(weights(resumed), weights(whole))


@pytest.mark.parametrize("dtype, precision, word", [
    (torch.bfloat16, "float32", "vanishes.*dtype='float32'"), (torch.float16, "float16", "vanishes"),
    (torch.float64, "bfloat16", "float32 weights; these are torch.float64"),
])
def test_weights_that_cannot_be_trained_are_refused(dtype, precision, word):
    vlm = bird_vlm(dtype=dtype)
    with pytest.raises(ValueError, match=word):
        finetune(vlm, Birdworld(n=8), BANK, replace(DEAL, precision=precision), progress=False)
    assert same(weights(vlm), weights(bird_vlm(dtype=dtype)))


@pytest.mark.parametrize("bad", [{"precision": "fp16"}, {"precision": torch.float16}, {"checkpoint_activations": "no"}])
def test_unknown_options_are_named(bad):
    with pytest.raises(ValueError, match=f"unknown {next(iter(bad))}"):
        replace(DEAL, **bad)
