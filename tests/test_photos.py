"""Photographs with names: the four that scikit-image brings along, one's own, and the preset that looks at them."""
from __future__ import annotations

from io import BytesIO
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from test_pictures import PHOTO, file

import dealkit
from dealkit import plots, presets
from dealkit.datasets import Photographs, bundled_photographs
from dealkit.evaluation import centre_maps, random_maps, uniform_maps
from dealkit.models import load_model


def pixels(picture: PIL.Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def test_the_bundled_photographs_have_a_bank_and_need_no_network(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("a download was tried"))
    photographs = bundled_photographs()
    assert list(photographs) == dealkit.load_concepts("photographs").categories
    sizes = {category: picture.size for category, picture in photographs.items()}
    assert sizes == {"tabby cat": (451, 300), "espresso": (600, 400), "astronaut": (512, 512), "rocket": (640, 427)}
    assert all(picture.mode == "RGB" and np.asarray(picture).std() > 20 for picture in photographs.values())


def test_ones_own_pictures_in_any_form(tmp_path):
    (tmp_path / "photo.png").write_bytes(file(PHOTO))
    own = Photographs({"path": tmp_path / "photo.png", "bytes": file(PHOTO), "array": np.asarray(PHOTO), "PIL": PHOTO,
                       "CMYK": file(PHOTO.convert("CMYK"), "JPEG")}, pixels)
    assert own.categories == ["path", "bytes", "array", "PIL", "CMYK"] and len(own) == 5
    for i in range(4):
        assert own[i]["label"] == i and torch.equal(own[i]["image"], pixels(PHOTO))
    assert list(own.notes) == ["CMYK"] and "CMYK" in own.notes["CMYK"][0]
    assert own[-1]["label"] == 4
    with pytest.raises(IndexError):
        own[5]
    with pytest.raises(ValueError, match="no picture"):
        Photographs({"text": b"hello"}, pixels)
    with pytest.raises(FileNotFoundError):
        Photographs({"gone": tmp_path / "gone.png"}, pixels)
    with pytest.raises(ValueError, match="no picture at all.*one or more"):
        Photographs({}, pixels)


@pytest.fixture
def any_clip(monkeypatch):
    """The preset's model with random weights, in the place of 605 MB from a hub."""
    torch.manual_seed(0)
    monkeypatch.setattr(presets, "load_model", lambda name, pretrained, device: load_model(name, None, "cpu"))


def test_the_clip_preset_explains_photographs(any_clip):
    setup = dealkit.preset("clip", device="cpu")
    assert setup.vlm.name == "ViT-B-32-quickgelu" and setup.train is setup.validation is setup.config is None
    images = torch.stack([item["image"] for item in setup.test])
    maps = dealkit.explain(setup.vlm, images, [setup.bank[name] for name in setup.test.categories])
    assert images.shape == (4, 3, 224, 224) and maps.shape == (4, 6, 7, 7) and maps.amax(dim=(2, 3)).min() > 0
    row = dealkit.evaluate(setup.vlm, setup.test, setup.bank, insertion_images=0)
    assert row["n"] == 4 and np.isnan(row["pointing_game"]) and 0 < row["overlap_cosine"] < 1


def test_without_weights_the_preset_says_what_to_do(monkeypatch):
    def offline(*names):
        raise OSError("offline")

    monkeypatch.setattr("dealkit.models.weights.reach_hub", offline)
    with pytest.raises(ConnectionError, match="openai.* not on this computer .*offline.*birdworld-vit"):
        dealkit.preset("clip", device="cpu")


def test_a_picture_is_read_once_and_whole():
    """The transform sees the picture itself, so that a crop is the model's choice."""
    seen = []
    photographs = Photographs({"wide": PIL.Image.open(BytesIO(file(PHOTO.resize((90, 40)))))},
                              lambda picture: seen.append(picture.size) or pixels(picture))
    photographs[0], photographs[0]
    assert seen == [(90, 40)] * 2 and photographs.pictures[0].size == (90, 40)


def test_the_photograph_cells_of_notebook_02_run(any_clip, tmp_path, monkeypatch, capsys):
    """Its committed outputs have no maps of CLIP (no network), so what a reader with one will run is run here."""
    shown = []
    monkeypatch.setattr(plots, "show", lambda fig, alt, **options: shown.append(plots.png(fig, **options)))
    (tmp_path / "mine.gif").write_bytes(file(PHOTO, "GIF", save_all=True, append_images=[PHOTO.rotate(180)]))
    own = str(tmp_path / "mine.gif")
    clip = dealkit.preset("clip", device="cpu")
    clip.test = Photographs(dict(zip(clip.test.categories[:2], clip.test.pictures)), clip.vlm.preprocess)
    clip.bank = {category: clip.bank[category][:2] for category in clip.test.categories}        # for speed
    names = {"clip": clip, "torch": torch, "dealkit": dealkit, "plots": plots,
             "metrics": dealkit.metrics, "pd": pd, "cosine_similarity": torch.nn.functional.cosine_similarity,
             **{maker.__name__: maker for maker in (random_maps, centre_maps, uniform_maps)}}
    path = Path(__file__).resolve().parents[1] / "notebooks" / "02_entanglement_diagnosis.ipynb"
    cells = [cell for cell in nbformat.read(path, as_version=4).cells
             if cell.cell_type == "code" and "photographs" in cell.metadata.get("tags", [])]
    assert len(cells) == 4
    for cell in cells:
        exec(cell.source.replace("my_photo, my_concepts = None", f"my_photo, my_concepts = {own!r}"), names)
    printed = capsys.readouterr().out
    assert len(shown) == 2 and all(method in printed for method in names["clip"].vlm.tower.methods)
    assert "first of 2 frames" in printed
