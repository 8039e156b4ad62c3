"""Words, tokens, and the text tower without its padding."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from conftest import TEXT, WORDS, random_images, tiny_vit
from open_clip import CLIPTextCfg, CLIPVisionCfg, CoCa, CustomTextCLIP
from open_clip.coca_model import MultimodalCfg

from dealkit.models import WordTokenizer
from dealkit.models.words import TokenCache, check_texts, encode_tokens, tokenize
from dealkit.paths import data_path

BIRD_WORDS = json.loads(data_path("birdworld", "vocab.json").read_text(encoding="utf-8"))
CONCEPTS = ["a photo of a bird with a long curved beak", "red head", "white belly and black wing tips"]


# ------------------------------------------------------------------------------------------------- the text tower


def test_cutting_the_padding_equals_open_clips_text_tower(vit):
    seen = []
    handle = vit.model.transformer.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    with torch.no_grad():
        ours = vit.encode_text(CONCEPTS)
        stock = vit.model.encode_text(open_clip.get_tokenizer("ViT-B-32-quickgelu")(CONCEPTS), normalize=True)
    handle.remove()
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)
    assert seen == [12, 77]  # ten words, start and end; the stock tower reads its whole context


VISION = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
TOWERS = {  # name: (settings of the text tower, may the padding be cut?)
    "CLIP": ({}, True),
    "MobileCLIP-B, causal": ({"no_causal_mask": False}, True),
    "MetaCLIP 2, pooled at an end id": ({"pool_type": "eos", "eos_id": TEXT["vocab_size"] - 1}, True),
    "a linear projection": ({"proj_bias": True}, True),
    "no projection": ({"proj_type": "none", "width": 24}, True),
    "SigLIP": ({"no_causal_mask": True, "pool_type": "last", "proj_bias": True}, False),
    "MobileCLIP-S1": ({"no_causal_mask": True}, False),
}


@pytest.mark.parametrize("in_model", [True, False])
@pytest.mark.parametrize("name", TOWERS)
def test_each_kind_of_text_tower_agrees_with_open_clip(name, in_model):
    settings, cuts = TOWERS[name]
    torch.manual_seed(0)
    build = open_clip.CLIP if in_model else CustomTextCLIP
    model = build(24, CLIPVisionCfg(**VISION), CLIPTextCfg(**{**TEXT, **settings})).double().eval()
    for parameter in model.parameters():  # open_clip starts positions near 0; make them matter
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = WordTokenizer(WORDS, 8)(["red head", "a bird with red wing"])
    text, lengths = (model if in_model else model.text), []
    text.transformer.register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    torch.testing.assert_close(encode_tokens(model, tokens), model.encode_text(tokens))
    assert lengths == [7 if cuts else 8, 8]
    assert not torch.allclose(*model.encode_text(tokens), atol=0.01)  # the two texts differ at all


def test_coca_keeps_its_padding():
    """CoCa reads a class token behind the padding."""
    torch.manual_seed(0)
    model = CoCa(24, MultimodalCfg(width=16, heads=2, layers=1, context_length=8),
                 CLIPTextCfg(**TEXT, embed_cls=True, output_tokens=True),
                 CLIPVisionCfg(**VISION, attentional_pool=True, attn_pooler_heads=2, output_tokens=True)).eval()
    tokens, lengths = WordTokenizer(WORDS, 8)(["red head"]), []
    model.text.transformer.register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    torch.testing.assert_close(encode_tokens(model, tokens), model.encode_text(tokens, normalize=False))
    assert lengths == [9, 9]


def test_cutting_the_padding_of_a_tower_that_reads_it_would_change_the_result():
    """Why the rule has exceptions: the same weights without the causal mask, cut and uncut."""
    torch.manual_seed(0)
    model = open_clip.CLIP(24, CLIPVisionCfg(**VISION), CLIPTextCfg(**TEXT, no_causal_mask=True)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = WordTokenizer(WORDS, 8)(["red head"])
    full = encode_tokens(model, tokens)
    model.attn_mask = torch.zeros(8, 8, dtype=torch.float64)  # pretend: everything sees everything, yet it is cut
    assert not torch.allclose(full, encode_tokens(model, tokens), atol=0.05)


def test_embeddings_have_unit_norm_and_gradients():
    vlm = tiny_vit()
    for emb in (vlm.encode_text(["red head", "blue wing"]), vlm.encode_image(random_images(vlm))):
        torch.testing.assert_close(emb.norm(dim=-1), torch.ones(2, dtype=torch.float64))
        assert emb.requires_grad
    with torch.no_grad():
        assert not vlm.encode_text(["red head"]).requires_grad


@pytest.mark.parametrize("error, says, texts", [
    (TypeError, r"put it in a list: \['red'\]", "red"),
    (TypeError, "a set; expected a list of str", {"red"}),
    (TypeError, "a NoneType", None),
    (ValueError, "K = 0", []),
    (TypeError, r"texts\[1\] is a float", ["red", 0.5]),
    (ValueError, r"texts\[1\] is empty", ["red", "  "]),
])
def test_bad_texts(error, says, texts):
    for use in (check_texts, tiny_vit().encode_text):
        with pytest.raises(error, match=says):
            use(texts)


def test_a_text_longer_than_the_context_is_refused(vit):
    assert tokenize(vit.tokenizer, ["red " * 75], 77).shape == (1, 77)  # start and end make 77: just fits
    for count in (76, 77, 200):
        with pytest.raises(ValueError, match="longer than the model's context of 77"):
            vit.encode_text(["red", "red " * count])


class HubTokenizer:
    """Behaves as SigLIP's: no start, end token 1, padded with the end token, cut with the end kept."""

    class tokenizer:
        pad_token_id = 1

    def __call__(self, texts, context_length):
        rows = [[5] * len(text.split()) for text in texts]
        return torch.tensor([(row[:context_length - 1] + [1] * context_length)[:context_length] for row in rows])


def test_too_long_is_seen_where_the_end_token_is_also_the_padding():
    assert tokenize(HubTokenizer(), ["red " * 7], 8).tolist() == [[5] * 7 + [1]]
    for count in (8, 9, 30):
        with pytest.raises(ValueError, match="context of 8"):
            tokenize(HubTokenizer(), ["red", "red " * count], 8)


# -------------------------------------------------------------------------------------------------------------- words


def test_words_become_tokens():
    tokenizer = WordTokenizer(WORDS, 6)
    assert tokenizer(["red head", "A bird, with."]).tolist() == [[1, 2, 4, 10, 0, 0], [1, 8, 7, 9, 10, 0]]
    assert tokenizer("red").tolist() == [[1, 2, 10, 0, 0, 0]]
    assert tokenizer(["red " * 9]).tolist() == [[1, 2, 2, 2, 2, 10]]  # open_clip's convention: cut, the end kept
    assert tokenizer(["red"], context_length=3).tolist() == [[1, 2, 10]]


def test_an_unknown_word_lists_the_known_ones(birdworld_random):
    with pytest.raises(ValueError, match="(?s)no word for 'crest', 'pink'.*red.*beak.*zorvit"):
        birdworld_random.encode_text(["red head", "crest of pink head"])


def test_birdworlds_vocabulary_fits_its_model(birdworld_random):
    tokens = birdworld_random.tokenizer([" ".join(BIRD_WORDS[:18])])
    assert int(tokens.max()) == len(BIRD_WORDS) + 2 == birdworld_random.model.vocab_size - 1
    assert tokens.shape == (1, 20)
    with pytest.raises(ValueError, match="context of 20"):
        birdworld_random.encode_text(["red " * 19])


def test_short_texts_do_not_wait_for_long_ones(vit, monkeypatch):
    """Texts of all lengths at once, in any order, equal each by itself and open_clip's own full length."""
    model, seen = vit.model, []
    forward = model.transformer.forward
    monkeypatch.setattr(model.transformer, "forward",
                        lambda x, **kw: (seen.append(tuple(x.shape[:2])), forward(x, **kw))[1])
    words = [3, 60, 12, 30, 1, 36, 3]
    tokens = torch.zeros(len(words), 77, dtype=torch.long)
    for row, count in zip(tokens, words):
        row[0], row[count + 1] = 49406, 49407
        row[1:count + 1] = torch.arange(320, 320 + count)
    together = encode_tokens(model, tokens)
    assert seen == [(4, 14), (2, 38), (1, 62)]                           # texts, and the length of the longest of them
    whole = model.encode_text(tokens, normalize=False)
    torch.testing.assert_close(together, whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together, torch.cat([encode_tokens(model, row[None]) for row in tokens]), atol=1e-5,
                               rtol=1e-4)
    together.sum().backward()
    assert model.token_embedding.weight.grad[320].abs().sum() > 0
    model.zero_grad()


def test_tokens_are_kept_and_forgotten_but_never_changed():
    calls = []

    def counting(texts, context_length):
        calls.extend(texts)
        return words(texts, context_length)

    words, cache = WordTokenizer(["red", "blue", "head"], 6), TokenCache(most=3)
    for texts in (["red head", "blue"], ["blue", "red head", "blue"], ["red", "head", "red"], ["blue"]):
        assert torch.equal(cache(counting, texts, 6), words(texts))
    # each asked for twice, because `tokenize` looks for what is cut off; the third list did not fit beside the first
    assert calls == ["red head", "blue"] * 2 + ["red", "head"] * 2 + ["blue"] * 2
    assert cache(counting, ["red"], 5).shape == (1, 5)                   # another context is another row
    with pytest.raises(ValueError, match="no word for 'green'"):
        cache(counting, ["red", "green"], 6)
    assert len(cache.rows) <= 3
