"""Loading, saving and looking at models, and a clear word where that fails."""

from __future__ import annotations

import re
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import huggingface_hub
import open_clip
import pytest
import torch
from conftest import random_images
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from dealkit.datasets import Birdworld
from dealkit.models import hub, load_model, weights


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


SHIPPED = {"birdworld-vit": ["seed0", "seed1", "seed2", "seed3"], "birdworld-rn": ["seed0", "seed1"]}
shipped = pytest.mark.parametrize("name, seed", [(name, seed) for name, seeds in SHIPPED.items()
                                                 for seed in ("default", *seeds)])


@shipped
def test_birdworlds_weights_come_with_dealkit(name, seed):
    vlm = load_model(name, seed, device="cpu")
    with torch.no_grad():
        emb = vlm.encode_text(["red head", "a photo of a bird with red head", "blue wing"])
    assert emb[0] @ emb[1] > emb[0] @ emb[2]


@shipped
def test_birdworlds_weights_know_its_birds(name, seed):
    """Chance is one in 16."""
    vlm = load_model(name, seed, device="cpu")
    birds = Birdworld("test", n=64, size=vlm.image_size[0])
    batch, texts = birds.batch(range(64)), [f"a photo of a {category}" for category in birds.categories]
    with torch.no_grad():
        scores = vlm.encode_image(batch["image"]) @ vlm.encode_text(texts).T
    assert (scores.argmax(dim=1) == batch["label"]).float().mean() > 0.8


def test_every_shipped_seed_has_its_own_weights_and_default_is_the_first():
    digests = {}
    for name, seeds in SHIPPED.items():
        found = {seed: weights.weights_digest(load_model(name, seed, device="cpu").model) for seed in seeds}
        assert weights.weights_digest(load_model(name, device="cpu").model) == found["seed0"]
        digests |= {(name, seed): digest for seed, digest in found.items()}
        with pytest.raises(ValueError, match=f"Tags of {name}: {', '.join(seeds)}; a .safetensors file"):
            load_model(name, "seed99")
    assert len(set(digests.values())) == len(digests) == 6


def test_dtypes():
    vlm = load_model("birdworld-vit", pretrained=None, device="cpu", dtype="float64")
    assert vlm.dtype == torch.float64 and vlm.encode_image(torch.zeros(1, 3, 80, 80)).dtype == torch.float64
    assert load_model("birdworld-vit", None, "cpu", torch.bfloat16).encode_text(["red"]).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="unknown dtype 'int8'.*float32"):
        load_model("birdworld-vit", pretrained=None, dtype="int8")


@pytest.mark.parametrize("device", ["foo", "", 3.5, f"cuda:{torch.cuda.device_count()}"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match=f"^device {device!r} is not one that this computer has, .*'cpu'"):
        load_model("birdworld-vit", pretrained=None, device=device)


@pytest.mark.parametrize("name, close", [("ViT-B32", "ViT-B-32"), ("birdworld", "birdworld-vit"), ("RN-50", "RN50")])
def test_an_unknown_model_brings_close_names(name, close):
    with pytest.raises(ValueError, match=f"unknown model '{name}'.*'{close}'"):
        load_model(name)


@pytest.mark.parametrize("name, pretrained, says", [
    ("ViT-B-32-quickgelu", "default", "no default weights.*openai.*None for random"),
    ("ViT-B-32-quickgelu", "opanai", "neither a tag of ViT-B-32-quickgelu nor a file.*openai"),
    ("birdworld-vit", "seed99", "neither a tag.*seed0, seed1"),
    ("birdworld-vit", "rn-seed0", "neither a tag of birdworld-vit nor a file"),
    ("birdworld-vit-224", "default", "no default weights.*Tags of birdworld-vit-224: none"),
    ("birdworld-vit-224", "seed0", "neither a tag of birdworld-vit-224 nor a file"),
    ("ViT-B-32", "openai", "trained with QuickGELU, and ViT-B-32 computes GELU.*'ViT-B-32-quickgelu'"),
    ("ViT-B/32", "openai", "'ViT-B-32-quickgelu'"),
    ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "trained with GELU.*'ViT-B-32' instead"),
    ("RN50", "yfcc15m", "pickle only|QuickGELU"),
])
def test_bad_tags(name, pretrained, says):
    with pytest.raises(ValueError, match=f"(?s){says}"):
        load_model(name, pretrained)


def test_every_tag_is_taken_or_sent_to_a_model_that_takes_it(monkeypatch):
    """roberta-ViT-B-32 computes QuickGELU and has no other name; its tag does not say so."""
    monkeypatch.setattr(weights, "reach_hub", lambda *names: None)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: "weights.safetensors")
    refused = {}
    for name in open_clip.list_models():
        for tag in open_clip.list_pretrained_tags_by_model(name):
            try:
                assert weights.find_weights(name, tag) == tag
            except ValueError as error:
                refused[name, tag] = re.search(r"Load '(.*)'\.", str(error)).group(1)
    assert {("ViT-B-32", "openai"), ("ViT-L-14", "openai"), ("RN50", "openai")} <= refused.keys()
    assert ("roberta-ViT-B-32", "laion2b_s12b_b32k") not in refused
    for (name, tag), right in refused.items():
        assert right != name and weights.find_weights(right, tag) == tag


def test_weights_that_cannot_be_fetched(monkeypatch):
    def no_network(config):
        raise FileNotFoundError("name resolution failed")

    monkeypatch.setattr(weights, "reach_hub", lambda *names: None)
    monkeypatch.setattr(open_clip, "download_pretrained", no_network)
    with pytest.raises(ConnectionError, match=r"name resolution failed.*load_model\('birdworld-vit'\)"):
        load_model("ViT-B-32-quickgelu", "openai")


class Refuses(BaseHTTPRequestHandler):
    def do_HEAD(self):  # noqa: N802
        self.send_error(405)

    def log_message(self, *args):
        pass


def test_no_way_to_the_hub_is_said_at_once(monkeypatch, tmp_path):
    """Its own library would try for a minute. Any answer is a way, even a refusal; a file in the cache needs none."""
    fetched = []
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: fetched.append(config) or "weights.bin")
    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        thread = Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(ValueError, match="pickle only"):  # so it went on to the download
            load_model("ViT-B-32-quickgelu", "openai")
        thread.join()
    assert len(fetched) == 1
    with pytest.raises(ConnectionError, match="(?s)could not be fetched.*load_model"):  # nobody listens any more
        load_model("ViT-B-32-quickgelu", "openai")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
        load_model("ViT-B-32-quickgelu", "openai")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repository, name: str(tmp_path / name))
    with pytest.raises(ValueError, match="pickle only"):
        load_model("ViT-B-32-quickgelu", "openai")
    assert len(fetched) == 2


def test_weights_that_are_published_as_a_pickle(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "reach_hub", lambda *names: None)
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
