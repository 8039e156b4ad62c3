"""Grad-ECLIP, LeGrad and every exit against the tower written out by hand, and what all methods of `explain` promise.

Relevance and Grad-CAM are compared with Captum and with full backward passes in test_maps.py and test_attribution.py,
where second derivatives, frozen towers and traces left behind are tested for every method as well; what is refused in
test_methods_limits.py, what 200 calls leave in test_memory.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import METHODS, random_embeddings, random_images, tiny_vit

from dealkit.maps import VARIABLES, contributions, explain, to_maps
from dealkit.normalize import normalize_maps

every_method = pytest.mark.parametrize("build, method", METHODS)
VARIANTS = {"plain": {}, "layer scale": {"ls_init_value": 0.3}, "norm after pooling": {"final_ln_after_pool": True},
            "no norm before": {"no_ln_pre": True}, "one block": {"layers": 1}}


# ------------------------------------------------------------------------------------------- independent computations


def written_out(vlm, images):
    """The whole tower as a textbook has it: every token, every query, nothing cut.

    Returns, a list with one entry a block each: attention matrices `[B, heads, T, T]`, what the tokens read `[B, T,
    width]` before the output projection, queries, keys and values `[B, T, width]`, tokens after the block.
    """
    visual = vlm.model.visual
    x = visual.conv1(images).reshape(len(images), visual.conv1.out_channels, -1).permute(0, 2, 1)
    x = torch.cat([visual.class_embedding.expand(len(images), 1, -1), x], dim=1)
    x = visual.ln_pre(x + visual.positional_embedding)
    kept = {name: [] for name in ("attention", "read", "q", "k", "v", "tokens")}
    for block in visual.transformer.resblocks:
        heads, width = block.attn.num_heads, block.attn.embed_dim
        q, k, v = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).split(width, dim=-1)
        split = [t.reshape(len(x), -1, heads, width // heads) for t in (q, k, v)]
        attention = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", *split[:2]) / (width // heads) ** 0.5, dim=-1)
        read = torch.einsum("bhqk,bkhd->bqhd", attention, split[2]).reshape(x.shape)
        x = x + block.ls_1(block.attn.out_proj(read))
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
        for name, value in zip(kept, (attention, read, q, k, v, x)):
            kept[name].append(value)
    return kept


def written_out_score(vlm, tokens, text):
    """The cosine of each image and one text, with CLS of these tokens as the image's embedding; summed over images."""
    return F.cosine_similarity(vlm.model.visual.ln_post(tokens)[:, 0] @ vlm.model.visual.proj, text[None]).sum()


def written_out_gradeclip(vlm, kept, text):
    """Zhao et al.: channel weights times values, times the loosened attention, patch by patch. `[B, h, w]`, signed."""
    gradient = torch.autograd.grad(written_out_score(vlm, kept["tokens"][-1], text), kept["read"][-1],
                                   retain_graph=True)[0]
    weights = gradient[:, 0]
    assert gradient[:, 1:].abs().max() == 0  # nothing but CLS reaches the embedding from here
    maps = []
    for i in range(len(weights)):
        query, keys, values = (kept[name][-1][i] for name in "qkv")
        closeness = torch.stack([query[0] @ key / (query[0].norm() * key.norm()) for key in keys[1:]])
        closeness = (closeness - closeness.min()) / (closeness.max() - closeness.min())
        maps.append(torch.stack([c * (weights[i] * value).sum() for c, value in zip(closeness, values[1:])]))
    return torch.stack(maps).unflatten(1, vlm.grid).detach()


def written_out_legrad(vlm, kept, text):
    """Bousselham et al.: a score for each block's tokens, its gradient at that block's attention. `[B, blocks, h, w]`.

    Averaged over heads and added up, not averaged, over the rows: all but CLS's are empty.
    """
    rows, signed = [], []
    for attention, tokens in zip(kept["attention"], kept["tokens"]):
        gradient = torch.autograd.grad(written_out_score(vlm, tokens, text), attention, retain_graph=True)[0]
        rows.append(gradient.clamp(min=0).mean(dim=1).sum(dim=1)[:, 1:])
        signed.append(gradient.mean(dim=1).sum(dim=1)[:, 1:])
    return (torch.stack(x, dim=1).mean(dim=1).unflatten(1, vlm.grid) for x in (rows, signed))


def written_out_every_exit(vlm, kept, text):
    """A score for each block's tokens, its gradient times attention in CLS's row. `[B, h, w]`, with ReLU and signed."""
    maps = []
    for attention, tokens in zip(kept["attention"], kept["tokens"]):
        gradient = torch.autograd.grad(written_out_score(vlm, tokens, text), attention, retain_graph=True)[0]
        maps.append((gradient * attention)[:, :, 0, 1:].detach().unflatten(-1, vlm.grid))
    return tuple(torch.cat(x, dim=1).mean(dim=1) for x in ([m.clamp(min=0) for m in maps], maps))


def assert_equal_up_to_rounding(actual, expected):
    scale = expected.abs().max().item()
    loose = actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=(1e-4 if loose else 1e-10) * scale, rtol=1e-3 if loose else 1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradeclip_equals_a_full_backward_pass_per_text(variant):
    vlm = tiny_vit(**VARIANTS[variant])
    images, texts = random_images(vlm), random_embeddings(vlm, 3)
    kept = written_out(vlm, images)
    maps = explain(vlm, images, texts, method="gradeclip")
    signed = explain(vlm, images, texts, method="gradeclip", signed=True)
    for k in range(3):
        expected = written_out_gradeclip(vlm, kept, texts[k])
        assert_equal_up_to_rounding(signed[:, k], expected)
        assert_equal_up_to_rounding(maps[:, k], expected.clamp(min=0))
    assert maps.shape == (2, 3, *vlm.grid) and (maps > 0).any() and (signed < 0).any()


@pytest.mark.parametrize("method, oracle", [("legrad", written_out_legrad), ("every_exit", written_out_every_exit)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_methods_of_every_block_equal_a_full_backward_pass_per_text_and_block(variant, method, oracle):
    vlm = tiny_vit(**VARIANTS[variant])
    images, texts = random_images(vlm), random_embeddings(vlm, 3)
    kept = written_out(vlm, images)
    maps = explain(vlm, images, texts, method=method)
    signed = explain(vlm, images, texts, method=method, signed=True)
    for k in range(3):
        expected, expected_signed = oracle(vlm, kept, texts[k])
        assert_equal_up_to_rounding(maps[:, k], expected)
        assert_equal_up_to_rounding(signed[:, k], expected_signed)
    assert maps.shape == (2, 3, *vlm.grid) and (maps > 0).any() and (signed < 0).any()


def test_the_last_blocks_share_of_every_exit_is_relevance():
    vlm = tiny_vit()
    images, texts = random_images(vlm), random_embeddings(vlm, 3)
    split = vlm.tower.split(images, kind="exits")
    values = contributions(split, texts, vlm.grid, method="every_exit").unflatten(2, (3, 4))      # blocks, heads
    relevance = explain(vlm, images, texts, method="relevance")
    assert_equal_up_to_rounding(to_maps(values[:, :, -1]), relevance)
    for block in (0, 1):                                     # what earlier exits add is not in the last block's map
        assert F.cosine_similarity(to_maps(values[:, :, block]).flatten(), relevance.flatten(), dim=0) < 0.95
    assert torch.equal(contributions(split, texts, vlm.grid), contributions(split, texts, vlm.grid, method="legrad"))
    one_block = tiny_vit(layers=1)
    maps = [explain(one_block, images, texts, method=method) for method in ("every_exit", "relevance")]
    torch.testing.assert_close(*maps)


def test_all_on_a_model_of_real_size(vit):
    images, texts = random_images(vit, 1), random_embeddings(vit, 2)
    kept = written_out(vit, images)
    maps = {method: explain(vit, images, texts, method=method) for method in ("gradeclip", "legrad", "every_exit")}
    for k in range(2):
        assert_equal_up_to_rounding(maps["gradeclip"][:, k], written_out_gradeclip(vit, kept, texts[k]).clamp(min=0))
        assert_equal_up_to_rounding(maps["legrad"][:, k], next(written_out_legrad(vit, kept, texts[k])))
        assert_equal_up_to_rounding(maps["every_exit"][:, k], written_out_every_exit(vit, kept, texts[k])[0])


def test_gradeclip_is_the_gradient_of_the_attention_times_the_closeness():
    """Its channel weights and values, multiplied and summed, are what LeGrad reads in the last block, over heads."""
    vlm = tiny_vit()
    images, texts = random_images(vlm), random_embeddings(vlm, 3)
    last = contributions(vlm.tower.split(images, kind="exits"), texts, vlm.grid)[:, :, -4:].sum(dim=2)  # its 4 heads
    kept = written_out(vlm, images)
    closeness = F.cosine_similarity(kept["q"][-1][:, :1], kept["k"][-1][:, 1:], dim=-1).unflatten(1, vlm.grid).detach()
    expected = last * normalize_maps(closeness)[:, None]
    assert_equal_up_to_rounding(explain(vlm, images, texts, method="gradeclip", signed=True), expected)


def test_the_cuts_give_open_clips_embedding():
    vlm = tiny_vit()
    images = random_images(vlm)
    expected = vlm.model.encode_image(images)
    context, exits = (vlm.tower.split(images, kind=kind) for kind in ("context", "exits"))
    torch.testing.assert_close(context.head(context.variable), expected)
    torch.testing.assert_close(exits.head(exits.variable), expected)
    kept = written_out(vlm, images)
    torch.testing.assert_close(context.variable.flatten(1), kept["read"][-1][:, 0])
    assert len(exits.exits) == 3
    for stop, attention, tokens in zip(exits.exits, kept["attention"], kept["tokens"]):
        torch.testing.assert_close(stop.variable, attention[:, :, 0])
        torch.testing.assert_close(stop.head(stop.variable), vlm.model.visual.ln_post(tokens)[:, 0]
                                   @ vlm.model.visual.proj)


@pytest.mark.parametrize("method", ["gradeclip", "legrad", "every_exit"])
def test_gradient_checkpointing_changes_nothing(method):
    images, results = random_images(tiny_vit()), []
    for enabled in (False, True):
        vlm = tiny_vit()
        vlm.model.set_grad_checkpointing(enabled)
        maps = explain(vlm, images, ["red head", "blue wing"], method=method, create_graph=True)
        results.append((maps, torch.autograd.grad(maps.square().sum(), vlm.model.visual.conv1.weight)[0]))
    for plain, recomputed in zip(*results):
        torch.testing.assert_close(plain, recomputed)
    assert results[0][1].abs().max() > 0


# ------------------------------------------------------------------------------------------------- what all of them do


@every_method
def test_texts_and_images_do_not_meet(build, method):
    vlm = build()
    images, texts = random_images(vlm, 3), random_embeddings(vlm, 10)  # more than go through one backward pass
    for signed in (False, True):
        maps = explain(vlm, images, texts, method=method, signed=signed)
        for k in (0, 7, 8, 9):
            one_text = explain(vlm, images, texts[k:k + 1], method=method, signed=signed)
            torch.testing.assert_close(one_text[:, 0], maps[:, k])
        for i in range(3):
            one_image = explain(vlm, images[i:i + 1], texts, method=method, signed=signed)
            torch.testing.assert_close(one_image[0], maps[i])


@every_method
def test_signed_values_are_those_before_the_relu(build, method):
    vlm = build()
    images, texts = random_images(vlm), random_embeddings(vlm, 3)
    maps, signed = (explain(vlm, images, texts, method=method, signed=signed) for signed in (False, True))
    assert maps.min() >= 0 and signed.min() < 0 < maps.max()
    assert (maps >= signed - 1e-12).all()  # a ReLU only raises
    if method not in ("relevance", "legrad", "every_exit"):  # one head: the ReLU acts on the finished map
        torch.testing.assert_close(maps, signed.relu())


@every_method
def test_the_gradient_in_the_first_and_the_last_block_is_that_of_finite_differences(build, method):
    vlm = build()
    visual, images, texts = vlm.model.visual, random_images(vlm), random_embeddings(vlm, 2)
    target = torch.rand(2, 2, *vlm.grid, dtype=torch.float64)
    scale = explain(vlm, images, texts, method=method).max()
    loss = lambda create_graph: ((explain(  # noqa: E731
        vlm, images, texts, method=method, create_graph=create_graph) / scale - target) ** 2).sum()
    if build is tiny_vit:
        first, last = (visual.transformer.resblocks[i].attn.in_proj_weight for i in (0, -1))
    else:
        first, last = visual.layer1[0].conv1.weight, visual.layer4[-1].conv3.weight
    for weight, gradient in zip((first, last), torch.autograd.grad(loss(True), (first, last))):
        place = torch.unravel_index(gradient.abs().argmax(), gradient.shape)
        values, step = [], 1e-8  # a ResNet has a kink at every ReLU; float64 leaves digits enough
        with torch.no_grad():
            for move in (step, -2 * step):
                weight[place] += move
                values.append(loss(False))
            weight[place] += step
        torch.testing.assert_close((values[0] - values[1]) / (2 * step), gradient[place], rtol=1e-4, atol=1e-6)
        assert gradient[place].abs() > 1e-3


@every_method
def test_one_pass_through_the_trunk_serves_all_texts(build, method):
    vlm, calls = build(), []
    layers = ["conv1", "transformer.resblocks.1.ln_1"] if build is tiny_vit else ["conv1", "layer4.0.conv1"]
    handles = [vlm.model.visual.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
               for name in layers]
    explain(vlm, random_images(vlm), random_embeddings(vlm, 6), method=method, create_graph=True)
    for handle in handles:
        handle.remove()
    assert sorted(calls) == layers


@every_method
def test_half_precision_maps_are_close_to_float32(build, method):
    vlm, half = build(torch.float32), build(torch.float32)
    half.model.to(torch.bfloat16)
    images, texts = random_images(vlm), random_embeddings(vlm, 3)
    expected = explain(vlm, images, texts, method=method)
    maps = explain(half, images, texts, method=method)
    assert maps.dtype == torch.bfloat16
    assert F.cosine_similarity(maps.float().flatten(), expected.flatten(), dim=0) > 0.98


@every_method
def test_maps_of_a_split_that_training_made_itself(build, method):
    vlm = build()
    images, texts = random_images(vlm), random_embeddings(vlm, 3)
    split = vlm.tower.split(images, kind=VARIABLES[method])
    torch.testing.assert_close(split.head(split.variable), vlm.model.encode_image(images))
    maps = to_maps(contributions(split, texts, vlm.grid, create_graph=True, method=method))
    torch.testing.assert_close(maps, explain(vlm, images, texts, method=method))
    assert maps.requires_grad
