"""Loading and saving models, their words, and the text tower without its padding."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from conftest import TEXT, WORDS, random_images, tiny_vit
from open_clip import CLIPTextCfg, CLIPVisionCfg, CoCa, CustomTextCLIP
from open_clip.coca_model import MultimodalCfg
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from dealkit.models import VLM, WordTokenizer, load_model
from dealkit.models.words import check_texts, encode_tokens, tokenize
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


# --------------------------------------------------------------------------------------------------- images and looks


def test_preprocess_and_back(vit, birdworld_random):
    picture = Image.new("RGB", (100, 90), (255, 128, 0))
    for vlm, size in ((vit, 224), (birdworld_random, 80)):
        image = vlm.preprocess(picture)
        assert image.shape == (3, size, size) and vlm.image_size == (size, size)
        colours = vlm.unnormalise(image[None]).mean(dim=(0, 2, 3))
        torch.testing.assert_close(colours, torch.tensor([1.0, 128 / 255, 0.0]), atol=1e-4, rtol=0)
    assert birdworld_random.preprocess(picture).max() == 1.0  # Birdworld's images are not normalised
    assert vit.preprocess(picture).max() > 1.5


def test_a_vlm_tells_what_it_is(birdworld_random):
    vlm = birdworld_random
    assert (vlm.name, vlm.grid, vlm.device.type, vlm.dtype) == ("birdworld-vit", (10, 10), "cpu", torch.float32)
    assert vlm.logit_scale.shape == () and vlm.logit_scale.requires_grad
    torch.testing.assert_close(vlm.logit_scale, vlm.model.logit_scale.exp())
    assert not vlm.model.training and type(vlm.model) is open_clip.CLIP
    assert vlm.to("cpu") is vlm and "birdworld-vit" in repr(vlm)


# ------------------------------------------------------------------------------------------------- loading and saving


def test_what_is_saved_is_what_both_loaders_read(tmp_path, birdworld_random):
    path = birdworld_random.save(tmp_path / "new folder" / "weights.safetensors")
    assert [file.name for file in path.parent.iterdir()] == ["weights.safetensors"]  # nothing temporary is left
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"model": "birdworld-vit"}
    images, texts = random_images(birdworld_random), ["red head"]
    ours = load_model("birdworld-vit", pretrained=path, device="cpu")
    stock = open_clip.create_model("birdworld-vit", pretrained=str(path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_text(texts), birdworld_random.encode_text(texts), atol=0, rtol=0)
        expected = birdworld_random.encode_image(images)
        torch.testing.assert_close(ours.encode_image(images), expected, atol=0, rtol=0)
        torch.testing.assert_close(stock.encode_image(images, normalize=True), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", ["default", "seed0", "seed1"])
def test_birdworlds_weights_come_with_dealkit(seed):
    vlm = load_model("birdworld-vit", seed, device="cpu")
    with torch.no_grad():
        emb = vlm.encode_text(["red head", "a photo of a bird with red head", "blue wing"])
    assert emb[0] @ emb[1] > emb[0] @ emb[2]


def test_dtypes():
    vlm = load_model("birdworld-vit", pretrained=None, device="cpu", dtype="float64")
    assert vlm.dtype == torch.float64 and vlm.encode_image(torch.zeros(1, 3, 80, 80)).dtype == torch.float64
    assert load_model("birdworld-vit", None, "cpu", torch.bfloat16).encode_text(["red"]).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="unknown dtype 'int8'.*float32"):
        load_model("birdworld-vit", pretrained=None, dtype="int8")


@pytest.mark.parametrize("name, close", [("ViT-B32", "ViT-B-32"), ("birdworld", "birdworld-vit"), ("RN-50", "RN50")])
def test_an_unknown_model_brings_close_names(name, close):
    with pytest.raises(ValueError, match=f"unknown model '{name}'.*'{close}'"):
        load_model(name)


@pytest.mark.parametrize("name, pretrained, says", [
    ("ViT-B-32-quickgelu", "default", "no default weights.*openai.*None for random"),
    ("ViT-B-32-quickgelu", "opanai", "neither a tag of ViT-B-32-quickgelu nor a file.*openai"),
    ("birdworld-vit", "seed99", "neither a tag.*seed0, seed1"),
    ("ViT-B-32", "openai", "trained with QuickGELU, and ViT-B-32 computes GELU.*'ViT-B-32-quickgelu'"),
    ("ViT-B/32", "openai", "'ViT-B-32-quickgelu'"),
    ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "trained with GELU.*'ViT-B-32' instead"),
    ("RN50", "yfcc15m", "pickle only|QuickGELU"),
])
def test_bad_tags(name, pretrained, says):
    with pytest.raises(ValueError, match=f"(?s){says}"):
        load_model(name, pretrained)


def test_weights_that_cannot_be_fetched(monkeypatch):
    def no_network(config):
        raise FileNotFoundError("name resolution failed")

    monkeypatch.setattr(open_clip, "download_pretrained", no_network)
    with pytest.raises(ConnectionError, match=r"name resolution failed.*load_model\('birdworld-vit'\)"):
        load_model("ViT-B-32-quickgelu", "openai")


def test_weights_that_are_published_as_a_pickle(monkeypatch, tmp_path):
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: str(tmp_path / "open_clip_model.bin"))
    with pytest.raises(ValueError, match="pickle only.*Choose another tag"):
        load_model("ViT-B-32-quickgelu", "openai")


def test_files_that_hold_something_else(tmp_path, birdworld_random):
    state = {key: value.clone() for key, value in birdworld_random.model.state_dict().items()}

    def file(name, changes=None, metadata=None, drop=()):
        tensors = {key: value for key, value in {**state, **(changes or {})}.items() if key not in drop}
        save_file(tensors, tmp_path / name, metadata=metadata)
        return tmp_path / name

    pickled = tmp_path / "weights.pt"
    torch.save(state, pickled)
    disguised = tmp_path / "disguised.safetensors"
    disguised.write_bytes(pickled.read_bytes())
    stretched = {"visual.positional_embedding": torch.zeros(50, 96)}
    for path, says in [
        (pickled, "not a .safetensors file.*pickles"),
        (disguised, "damaged or not a safetensors file"),
        (tmp_path / "absent.safetensors", "neither a tag of birdworld-vit nor a file"),
        (file("other.safetensors", metadata={"model": "RN50"}), r"weights of 'RN50', not of 'birdworld-vit'"),
        (file("missing.safetensors", drop=["ln_final.weight"]), "(?s)does not hold.*ln_final.weight"),
        (file("extra.safetensors", {"more": torch.zeros(1)}), "(?s)does not hold.*more"),
        (file("shape.safetensors", {"ln_final.weight": torch.zeros(7)}), "(?s)does not hold.*ln_final.weight"),
        (file("size.safetensors", stretched), r"positional_embedding is \(50, 96\)"),
    ]:
        with pytest.raises(ValueError, match=says):
            load_model("birdworld-vit", pretrained=path)
    assert load_model("birdworld-vit", pretrained=file("same.safetensors"), device="cpu").grid == (10, 10)


def test_bad_places_to_save(tmp_path, birdworld_random, monkeypatch):
    with pytest.raises(ValueError, match="must end in .safetensors"):
        birdworld_random.save(tmp_path / "weights.pt")
    (tmp_path / "a file").write_text("")
    with pytest.raises(OSError, match="cannot write.*writable"):
        birdworld_random.save(tmp_path / "a file" / "weights.safetensors")

    old = birdworld_random.save(tmp_path / "weights.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("dealkit.models.clip.save_file", full)
    with pytest.raises(OSError, match="No space left.*has space"):
        birdworld_random.save(tmp_path / "weights.safetensors")
    assert (tmp_path / "weights.safetensors").read_bytes() == old  # an interrupted save leaves the old file whole
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a file", "weights.safetensors"]
