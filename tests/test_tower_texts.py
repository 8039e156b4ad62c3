"""Text towers and tokenizers that open_clip takes from the Hugging Face hub: built, or named where they cannot be had.

A folder with a configuration and a vocabulary stands for the hub, so nothing is fetched.
"""

from __future__ import annotations

import json
import sys

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip import factory
from open_clip.coca_model import CoCa, MultimodalCfg
from tower_check import wake

import dealkit
from dealkit.models import VLM, WordTokenizer, load_model

transformers = pytest.importorskip("transformers")

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
VISION = {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}


@pytest.fixture
def bert(tmp_path, monkeypatch) -> str:
    """The name of an open_clip model whose text tower and tokenizer are a tiny BERT in a folder, without weights."""
    folder = tmp_path / "hub"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "head", "wing"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    transformers.BertConfig(**TINY, vocab_size=len(words), max_position_embeddings=40).save_pretrained(folder)
    text = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "hf_proj_type": "mlp",
            "hf_pooler_type": "mean_pooler", "context_length": 12}
    (tmp_path / "bert-ViT.json").write_text(json.dumps({"embed_dim": 12, "vision_cfg": VISION, "text_cfg": text}))
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    open_clip.add_model_config(tmp_path / "bert-ViT.json")
    return "bert-ViT"


def no_hub(*args, **options):
    raise OSError("We couldn't connect to the hub.\nCheck your connection.")


def test_a_text_tower_from_the_hub_has_random_weights_and_its_own_context(bert):
    """open_clip would fetch trained weights for it, which the folder does not have; and BERT would take 40 tokens."""
    vlm = load_model(bert, pretrained=None, device="cpu")
    assert vlm.model.context_length == 40
    tokens = open_clip.get_tokenizer(bert)(["red head", "blue wing"])
    assert tokens.shape == (2, 12)
    expected = vlm.model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(vlm.encode_text(["red head", "blue wing"]), expected)
    with pytest.raises(ValueError, match="context of 12 tokens"):
        vlm.encode_text(["red " * 11])
    assert dealkit.explain(vlm, torch.randn(2, 3, 16, 16), ["red head"], create_graph=True).shape == (2, 1, 2, 2)


def test_a_model_that_does_not_say_how_many_tokens_it_takes(bert):
    """mT5 has no limit, and open_clip says 0: a long text must be refused all the same."""
    vlm = load_model(bert, pretrained=None, device="cpu")
    expected = vlm.encode_text(["red head"])
    vlm.model.context_length = 0
    torch.testing.assert_close(vlm.encode_text(["red head"]), expected)
    with pytest.raises(ValueError, match="context of 12 tokens"):
        vlm.encode_text(["red " * 11])


@pytest.mark.parametrize("name, tower", [
    ("roberta-ViT-B-32", "roberta-base"), ("xlm-roberta-base-ViT-B-32", "xlm-roberta-base"),
    ("mt5-base-ViT-B-32", "google/mt5-base"), ("nllb-clip-base", "facebook/nllb-200-distilled-600M"),
    ("nllb-clip-base-siglip", "facebook/nllb-200-distilled-600M"), ("coca_roberta-ViT-B-32", "roberta-base")])
def test_a_text_tower_that_cannot_be_fetched_is_named(name, tower, monkeypatch):
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", no_hub)
    says = f"^the text tower of {name}, '{tower}' on the Hugging Face hub, is not on .*ViT-B-32-quickgelu.$"
    with pytest.raises(ConnectionError, match=says) as error:
        load_model(name, pretrained=None, device="cpu")
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_cannot_be_fetched_is_named_and_embeddings_work_without_it(bert, monkeypatch):
    vlm = load_model(bert, pretrained=None, device="cpu")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", no_hub)
    images = torch.randn(2, 3, 16, 16)
    with pytest.raises(ConnectionError, match="^the tokenizer of bert-ViT, '.*hub' on .*couldn't connect to the hub. "
                                              r"Connect once .*pass embeddings \[K, D\]") as error:
        dealkit.explain(vlm, images, ["red head"])
    assert "\n" not in str(error.value)
    assert dealkit.explain(vlm, images, torch.randn(3, 12)).shape == (2, 3, 2, 2)


def test_without_transformers_the_message_says_what_to_install(bert, monkeypatch):
    vlm = load_model(bert, pretrained=None, device="cpu")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"^the tokenizer of bert-ViT.*pip install .dealkit\[hub\]"):
        vlm.encode_text(["red head"])
    with pytest.raises(ImportError, match=r"^the text tower of roberta-ViT-B-32, 'roberta-base'.*dealkit\[hub\]"):
        load_model("roberta-ViT-B-32", pretrained=None, device="cpu")


def test_a_whole_coca_whose_own_embeddings_are_of_unit_norm():
    """Its encode_image has another default than CLIP's, and its tower returns its tokens beside the embedding."""
    torch.manual_seed(0)
    words = ["red", "head"]
    text = {"context_length": 8, "vocab_size": 5, "width": 12, "heads": 2, "layers": 1, "embed_cls": True,
            "output_tokens": True}
    model = CoCa(12, MultimodalCfg(width=12, heads=2, layers=1, context_length=8, vocab_size=5), open_clip.CLIPTextCfg(
        **text), open_clip.CLIPVisionCfg(**VISION, attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2,
                                         output_tokens=True)).eval()
    wake(model.visual, None)
    vlm, images = VLM("tiny coca", model, WordTokenizer(words, 7)), torch.randn(2, 3, 16, 16)
    split = vlm.tower.split(images)
    expected = model.encode_image(images)
    torch.testing.assert_close(split.head(split.variable), model.encode_image(images, normalize=False))
    torch.testing.assert_close(F.normalize(split.head(split.variable), dim=-1), expected)
    torch.testing.assert_close(vlm.encode_image(images), expected)
    for method in vlm.tower.methods:
        maps = dealkit.explain(vlm, images, ["red head", "head"], method=method)
        assert maps.shape == (2, 2, 2, 2) and maps.max() > 0
