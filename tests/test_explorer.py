"""The explorer: every control changes what is seen, and what goes wrong is said in the widget."""
from __future__ import annotations

import warnings
from datetime import datetime, timezone
from io import BytesIO

import numpy as np
import PIL.Image
import pytest
import torch
from test_pictures import PHOTO, file
from tiny_birds import BANK, bank_without, bird_resnet, bird_vlm

from dealkit import explain
from dealkit.datasets import Birdworld, Photographs
from dealkit.metrics import mass_in_mask
from dealkit.plots import overlap_matrices, png
from dealkit.widgets import Explorer

BIRDS = Birdworld("test", n=4)


@pytest.fixture
def explorer():
    return Explorer({"before": bird_vlm(0), "after": bird_vlm(1)}, BIRDS, bank=BANK)


def seen(widget) -> np.ndarray:
    assert widget.layout.display == "block"
    return np.asarray(PIL.Image.open(BytesIO(widget.value)).convert("RGB")).astype(int)


def upload(explorer, data: bytes, name: str = "photo.png") -> None:
    """As the browser does it: ipywidgets 8 hands over a tuple of dicts."""
    explorer.upload.value = ({"name": name, "type": "image/png", "size": len(data), "content": memoryview(data),
                              "last_modified": datetime.now(timezone.utc)},)


def test_it_opens_with_the_first_bird_its_concepts_and_its_scores(explorer):
    concepts = BANK[BIRDS.categories[BIRDS[0]["label"]]]
    assert explorer.text.value.splitlines() == concepts
    table = explorer.result
    assert table["model"].tolist() == ["before"] * 5 + ["after"] * 5 and table["concept"].tolist() == concepts * 2
    maps = explain(bird_vlm(1), BIRDS[0]["image"][None], concepts)
    expected = mass_in_mask(maps, BIRDS[0]["part_masks"][None], reduction="none")[0]      # one concept a part, in order
    found = torch.tensor(table["mass in part"][5:].to_numpy())
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-6)
    assert seen(explorer.maps).std() > 10 and seen(explorer.overlaps).std() > 10


def test_every_control_changes_the_picture(explorer):
    before = explorer.maps.value
    for change in (lambda: setattr(explorer.index, "value", 2), lambda: setattr(explorer.method, "value", "gradcam"),
                   lambda: setattr(explorer.text, "value", "red head\nblue wing"),
                   lambda: setattr(explorer.shown, "value", ("after",)), lambda: upload(explorer, file(PHOTO))):
        change()
        assert explorer.maps.value != before and seen(explorer.maps).any(), change
        before = explorer.maps.value
    assert explorer.result.empty and "mass" not in explorer.message.value, "an uploaded picture has no masks"
    explorer.index.value = 1
    assert len(explorer.result) == 5, "back to the data set, with one model shown"


def test_photographs_fit_models_of_any_size():
    """A tiny ViT of 80 pixels beside a ResNet of another size and grid, on the same whole picture."""
    models = {"vit": bird_vlm(), "rn": bird_resnet()}
    assert models["vit"].image_size != models["rn"].image_size and models["vit"].grid != models["rn"].grid
    explorer = Explorer(models, Photographs({"wren": PHOTO, "crow": PHOTO.rotate(90)}, models["vit"].preprocess),
                        concepts=["red head", "blue wing"])
    assert explorer.message.value == "" and seen(explorer.maps).any() and explorer.index.max == 1
    first = explorer.maps.value
    explorer.index.value = 1
    assert explorer.maps.value != first


def test_the_button_draws_anew_after_training(explorer):
    before = explorer.maps.value
    with torch.no_grad():
        for weight in explorer._models["after"].model.visual.parameters():
            weight.add_(torch.randn_like(weight) * weight.std())
    explorer.again.click()
    assert explorer.maps.value != before


def test_the_same_file_can_be_uploaded_twice(explorer):
    upload(explorer, file(PHOTO))
    with_photo = explorer.maps.value
    explorer.index.value = 1
    assert explorer.maps.value != with_photo
    explorer.text.value = "\n".join(BANK[BIRDS.categories[BIRDS[0]["label"]]])
    upload(explorer, file(PHOTO))
    assert explorer.maps.value == with_photo


def test_a_concept_that_names_no_part_has_no_score(explorer):
    explorer.text.value = "red head\na bird\n\nred head"
    assert explorer.result["concept"].tolist() == ["red head", "a bird"] * 2, "blank lines and repeats are left out"
    assert explorer.result["mass in part"].isna().tolist() == [False, True] * 2
    assert "no part named" in explorer.message.value


@pytest.mark.parametrize("text, message", [
    ("", "at least one concept"), ("turquoise head", "no word for &#x27;turquoise"), ("red head " * 300, "longer than"),
    ("\n".join("red orange yellow green blue purple head wing belly".split()), "9 concepts are more than fit"),
])
def test_errors_are_said_and_the_next_try_works(explorer, text, message):
    explorer.text.value = text
    assert explorer.maps.layout.display == explorer.overlaps.layout.display == "none"
    assert message in explorer.message.value and explorer.result.empty
    explorer.text.value = "red head"
    assert message not in explorer.message.value and seen(explorer.maps).any()


@pytest.mark.parametrize("data, message", [
    (b"<script>alert(1)</script>", "no picture"), (file(PHOTO, "JPEG")[:700], "cut off"),
    (file(PIL.Image.new("1", (6000, 5000))), "30 megapixels"), (file(PHOTO.resize((20, 15))), "20 x 15"),
])
def test_bad_uploads_are_said(explorer, data, message):
    upload(explorer, data)
    assert message in explorer.message.value and "<script>" not in explorer.message.value
    upload(explorer, file(PHOTO.convert("CMYK"), "JPEG"))
    assert "CMYK" in explorer.message.value and seen(explorer.maps).any()


def test_no_model_chosen_is_said(explorer):
    explorer.shown.value = ()
    assert "at least one model" in explorer.message.value


def test_without_a_data_set_it_waits_for_a_picture():
    explorer = Explorer({"CLIP": bird_vlm()}, concepts=["red head"])
    assert "Upload a picture" in explorer.message.value
    assert explorer.index not in explorer.children[0].children[0].children
    upload(explorer, file(PHOTO))
    assert explorer.message.value == "" and seen(explorer.maps).any()


def test_models_need_a_method_in_common():
    assert Explorer({"vit": bird_vlm(), "rn": bird_resnet()}, concepts=["red head"]).method.options == ("gradcam",)
    with pytest.raises(ValueError, match="no model to look with; expected name -> VLM"):
        Explorer({})


def test_drawing_leaves_nothing_behind(explorer):
    import gc

    import matplotlib.pyplot as plt
    hooks = [len(module._forward_hooks) + len(module._backward_hooks) for vlm in explorer._models.values()
             for module in vlm.model.modules()]
    assert sum(hooks) == 0 and plt.get_fignums() == []
    for n in range(5):                                            # the tokens of a text are kept once it was asked for
        explorer.index.value = n % 4
    gc.collect()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    for n in range(5):
        explorer.index.value = n % 4
    gc.collect()
    assert sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()) <= tensors + 5
    assert all(p.grad is None for vlm in explorer._models.values() for p in vlm.model.parameters())


def test_back_to_the_same_bird_after_an_upload(explorer):
    first = explorer.maps.value
    upload(explorer, file(PHOTO))
    assert explorer.maps.value != first
    explorer.back.click()
    assert explorer.maps.value == first and len(explorer.result) == 10 and not explorer.upload.value
    assert explorer.back not in Explorer({"vit": bird_vlm()}, concepts=["red head"]).children[0].children[0].children


@pytest.mark.parametrize("error, message", [
    (ImportError("install transformers"), "install transformers"), (KeyError("red"), "KeyError: &#x27;red&#x27;"),
    (IndexError("list index out of range"), "IndexError: list index"), (MemoryError(), "<b>MemoryError</b>"),
    (RuntimeError("out of memory"), "<b>out of memory</b>"),
    (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
])
def test_whatever_goes_wrong_is_said(explorer, monkeypatch, error, message):
    def fails(*args):
        raise error

    shown = explorer.maps.value
    for place, act in (("explain", explorer.again.click), ("open_picture", lambda: upload(explorer, file(PHOTO)))):
        with monkeypatch.context() as patch:
            patch.setattr(f"dealkit.widgets.explorer.{place}", fails)
            act()
        assert message in explorer.message.value and explorer.maps.layout.display == "none" and explorer.result.empty
    explorer.back.click()
    assert explorer.maps.value == shown and seen(explorer.maps).any() and message not in explorer.message.value


def test_an_image_that_cannot_be_had_and_an_upload_without_content_are_said():
    class Gone(Birdworld):
        def __getitem__(self, index):
            if index == 1:
                raise LookupError("the file of bird 1 was moved")
            return super().__getitem__(index)

    explorer = Explorer({"vit": bird_vlm()}, Gone("test", n=2), bank=BANK)
    explorer.index.value = 1
    assert "LookupError: the file of bird 1 was moved" in explorer.message.value and explorer.result.empty
    explorer.index.value = 0
    assert len(explorer.result) == 5
    upload(explorer, b"")
    assert "0 bytes are no picture" in explorer.message.value


def test_a_category_that_the_bank_lacks_leaves_the_concepts():
    first, second = (BIRDS.categories[BIRDS[i]["label"]] for i in (0, 1))
    assert first != second
    explorer = Explorer({"vit": bird_vlm()}, BIRDS, bank=bank_without(second))
    concepts = explorer.text.value
    explorer.index.value = 1
    assert f"no concepts for &#x27;{second}&#x27;" in explorer.message.value and explorer.text.value == concepts
    assert seen(explorer.maps).any() and "peak in part" in explorer.message.value, "the maps are drawn all the same"
    explorer.index.value = 0
    assert "no concepts for" not in explorer.message.value
    empty = Explorer({"vit": bird_vlm()}, BIRDS, bank=bank_without(first))
    assert f"no concepts for &#x27;{first}" in empty.message.value
    assert "Type at least one concept" in empty.message.value


@pytest.mark.parametrize("arguments, kind, message", [
    ({"models": "VLM"}, TypeError, "models is a VLM; expected name -> VLM"),
    ({"models": {"CLIP": "birdworld-vit"}}, TypeError, r"models\['CLIP'\] is a str; expected name -> VLM"),
    ({"concepts": "red head"}, TypeError, r"concepts is one string; .*concepts=\['red head'\]"),
    ({"bank": "birdworld"}, TypeError, "bank is a str; expected a ConceptBank"),
    ({"dataset": []}, ValueError, "the data set is empty"),
])
def test_arguments_that_could_not_work_are_refused_at_once(arguments, kind, message):
    models = bird_vlm() if arguments.get("models") == "VLM" else arguments.get("models", {"vit": bird_vlm()})
    with pytest.raises(kind, match=message):
        Explorer(**{"dataset": BIRDS, **arguments, "models": models})


@pytest.mark.parametrize("count, models, length", [(1, 2, 72), (1, 3, 18), (2, 1, 72), (8, 3, 72)])
def test_long_concepts_are_wrapped_in_the_overlaps_too(count, models, length):
    bill = "the long curved bill of a bird that stands in water and looks for fish"
    names = [f"{n} {bill}"[:length] for n in range(count)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")               # matplotlib's: labels that leave the axes no room
        figure = overlap_matrices([torch.rand(1, count, 5, 5)] * models, names, list("abc"[:models]))
        assert len(png(figure)) > 1000
    labels = figure.axes[0].get_xticklabels() + figure.axes[0].get_yticklabels()
    assert len(labels) == 2 * count
    assert all(0 < len(line) <= 18 for label in labels for line in label.get_text().split("\n"))
