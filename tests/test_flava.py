"""FLAVA through transformers, in small and with random weights: transformers' embeddings, and maps as of CLIP's ViT."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tower_check import wake

import dealkit
from dealkit.models import WordTokenizer, load_flava, wrap_flava

transformers = pytest.importorskip("transformers")

WORDS = ["red", "blue", "head", "wing"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}


def build():
    """(a FlavaModel of a few thousand weights, itself as a VLM)."""
    config = transformers.FlavaConfig(
        image_config={**SMALL, "image_size": (32, 24), "patch_size": 8}, projection_dim=12, hidden_size=32,
        text_config={**SMALL, "vocab_size": len(WORDS) + 3, "max_position_embeddings": 10}, multimodal_config=SMALL)
    flava = transformers.FlavaModel(config).double().eval()
    vlm = wrap_flava(flava, WordTokenizer(WORDS, 10))
    wake(vlm.model, None)
    return flava, vlm


@pytest.fixture(scope="module")
def pair():
    return build()


def pictures():
    return torch.randn(2, 3, 32, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def texts():
    return torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_embeddings_are_those_of_transformers(pair):
    """FLAVA's contrastive score: projected CLS tokens, of unit norm, times the exponential of its logit scale."""
    flava, vlm = pair
    image = flava.get_image_features(pixel_values=pictures()).pooler_output[:, 0]
    torch.testing.assert_close(vlm.encode_image(pictures()), F.normalize(image, dim=-1))
    torch.testing.assert_close(vlm.model.encode_image(pictures(), normalize=True), F.normalize(image, dim=-1))
    tokens = vlm.tokenizer(["red head", "blue", "red wing blue head"])
    text = flava.get_text_features(input_ids=tokens, attention_mask=(tokens != 0).long()).pooler_output[:, 0]
    torch.testing.assert_close(vlm.encode_text(["red head", "blue", "red wing blue head"]), F.normalize(text, dim=-1))
    torch.testing.assert_close(vlm.model.encode_text(tokens, normalize=True), F.normalize(text, dim=-1))
    assert not torch.allclose(*vlm.encode_text(["red head", "head red"]))
    torch.testing.assert_close(vlm.logit_scale, flava.logit_scale.exp())


def test_pictures_are_prepared_as_flava_prepares_them(pair):
    colours = np.random.default_rng(0).integers(256, size=(6, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(colours).resize((90, 60), Image.Resampling.BICUBIC)
    size = {"height": 32, "width": 24}
    prepare = transformers.FlavaImageProcessor(size=size, crop_size=size)
    expected = prepare(images=picture, return_tensors="pt")["pixel_values"][0]
    ours = pair[1].preprocess(picture)
    assert (ours - expected).abs().max() < 1.1 / 255 / 0.26  # a step of 255, in the narrowest colour's deviation
    assert ours.shape == expected.shape and ours.std() > 0.1


def test_every_cut_gives_the_embedding(pair):
    flava, vlm = pair
    expected = flava.get_image_features(pixel_values=pictures()).pooler_output[:, 0]
    assert vlm.grid == (4, 3) and vlm.tower.output_dim == 12 and expected.std() > 0.1
    for kind in ("attention", "features", "context", "exits"):
        split = vlm.tower.split(pictures(), kind=kind)
        torch.testing.assert_close(split.head(split.variable), expected)
    for block in (0, 1):
        split = vlm.tower.split(pictures(), block=block)
        torch.testing.assert_close(split.head(split.variable), expected)


def test_relevance_is_attention_times_gradient_as_transformers_reports_them(pair):
    flava, vlm = pair
    maps = dealkit.explain(vlm, pictures(), texts())
    output = flava.image_model(pixel_values=pictures(), output_attentions=True)
    embedding, attention = flava.image_projection(output.last_hidden_state[:, 0]), output.attentions[-1]
    for number, text in enumerate(texts()):
        score = F.cosine_similarity(embedding, text[None]).sum()
        product = attention * torch.autograd.grad(score, attention, retain_graph=True)[0]
        expected = product[:, :, 0, 1:].clamp(min=0).mean(dim=1).reshape(2, 4, 3)
        torch.testing.assert_close(maps[:, number], expected.detach())
    assert maps.amax(dim=(2, 3)).min() > 0


def test_every_method_trains_the_first_and_the_last_layer():
    _, vlm = build()
    layers = vlm.model.visual.image_model.encoder.layer
    for method in vlm.tower.methods:
        maps = dealkit.explain(vlm, pictures(), ["red head", "blue wing"], method=method, create_graph=True)
        assert maps.shape == (2, 2, 4, 3) and maps.isfinite().all()
        wanted = [layers[0].attention.attention.query.weight, layers[-1].attention.attention.value.weight]
        assert all(g.abs().max() > 0 for g in torch.autograd.grad(maps.square().sum(), wanted))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers 6 will have another name for it
def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(0)
        flava, vlm = build()
        if enabled:
            flava.gradient_checkpointing_enable()
            assert flava.image_model.encoder.layer[0].gradient_checkpointing
            flava.image_model.train()  # transformers recomputes in training mode only; no dropout in this configuration
        maps = dealkit.explain(vlm, pictures(), texts(), create_graph=True)
        weight = vlm.model.visual.image_model.encoder.layer[0].output.dense.weight
        gradients.append(torch.autograd.grad(maps.square().sum(), weight)[0])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_weights_are_shared_and_can_be_saved(tmp_path):
    flava, vlm = build()
    assert vlm.model.visual.image_projection is flava.image_projection
    path, before = vlm.save(tmp_path / "flava.safetensors"), vlm.encode_image(pictures())
    other_flava, other = build()
    other_flava.image_projection.weight.data.zero_()
    from safetensors.torch import load_file
    other.model.load_state_dict(load_file(path))
    torch.testing.assert_close(other.encode_image(pictures()), before)


def test_a_long_text_and_another_model_are_refused(pair):
    _, vlm = pair
    with pytest.raises(ValueError, match="context of 10 tokens"):
        vlm.encode_text(["red " * 20])
    with pytest.raises(TypeError, match="FlavaModel, not a Linear"):
        wrap_flava(torch.nn.Linear(2, 2), WordTokenizer(WORDS, 10))


def test_without_transformers_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for use in (load_flava, lambda: wrap_flava(None, None)):
        with pytest.raises(ImportError, match=r"pip install \"dealkit\[hub\]\""):
            use()


def test_without_weights_the_message_says_so(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "flava"}')
    with pytest.raises(ConnectionError, match="could not be fetched as safetensors"):
        load_flava(str(tmp_path))


def test_a_folder_of_a_saved_model_and_tokenizer_is_loaded(tmp_path):
    from transformers import BertTokenizer
    flava, vlm = build()
    flava.float().save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "head"]))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    loaded = load_flava(str(tmp_path), device="cpu")
    torch.testing.assert_close(loaded.encode_image(pictures()), vlm.encode_image(pictures()).float())
    assert loaded.tokenizer(["red head"], context_length=5).tolist() == [[2, 5, 6, 3, 0]]
    with pytest.raises(ValueError, match="longer than the model's context"):
        loaded.encode_text(["red " * 20])
