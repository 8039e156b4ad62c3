"""Which concepts discriminate: the table behind it and the editor in front of it."""
from __future__ import annotations

from io import BytesIO

import numpy as np
import PIL.Image
import pytest
import torch
from scipy.stats import mannwhitneyu
from tiny_birds import BANK, bird_vlm

from dealkit.datasets import Birdworld
from dealkit.evaluation import concept_table, embed_images
from dealkit.widgets import ConceptEditor


class TwoWords:
    """A text tower with two phrases along two axes."""

    def encode_text(self, texts):
        return torch.tensor([{"along x": [1., 0.], "along y": [0., 1.]}[text] for text in texts])


def test_the_table_by_hand():
    image_emb = torch.tensor([[.8, .6], [.6, .8], [.6, .8], [0., 1.]])
    table = concept_table(TwoWords(), (image_emb, torch.tensor([0, 0, 1, 1])), ["a", "b", "not in the bank"],
                          {"a": ["along x", "along y"], "b": ["along y"]})
    assert table[["category", "concept"]].values.tolist() == [["a", "along x"], ["a", "along y"], ["b", "along y"]]
    np.testing.assert_allclose(table["own"], [.7, .7, .9], atol=1e-6)
    np.testing.assert_allclose(table["others"], [.3, .9, .7], atol=1e-6)
    np.testing.assert_allclose(table["auc"], [3.5 / 4, .5 / 4, 3.5 / 4])       # a tie counts half


def test_without_images_to_compare_there_is_no_number():
    table = concept_table(TwoWords(), (torch.tensor([[1., 0.]]), torch.tensor([0])), ["a", "b"],
                          {"a": ["along x"], "b": ["along y"]})
    assert table["own"].tolist()[0] == 1 and np.isnan(table.loc[0, ["others", "auc"]].astype(float)).all()
    assert np.isnan(table["own"][1]) and table["others"][1] == 0


def test_the_auc_agrees_with_scipy_on_a_model():
    vlm, birds = bird_vlm(), Birdworld("test", n=48)
    embedded = image_emb, labels = embed_images(vlm, birds, n=48, batch_size=20)
    torch.testing.assert_close(image_emb, vlm.encode_image(torch.stack([bird["image"] for bird in birds])).detach())
    assert labels.tolist() == [bird["label"] for bird in birds]
    for row in concept_table(vlm, embedded, birds.categories, BANK).itertuples():
        cosine = (image_emb @ vlm.encode_text([row.concept])[0]).detach().double().numpy()
        own = labels.numpy() == birds.categories.index(row.category)
        u = mannwhitneyu(cosine[own], cosine[~own]).statistic
        assert row.auc == pytest.approx(u / own.sum() / (~own).sum())


def test_fewer_images_are_spread_over_the_data_set():
    birds = Birdworld("test", n=48)
    _, labels = embed_images(bird_vlm(), birds, n=3)
    assert labels.tolist() == [birds[i]["label"] for i in (0, 24, 47)]


# The editor


@pytest.fixture
def editor():
    return ConceptEditor(BANK, bird_vlm(), Birdworld("test", n=32))


def picture(editor) -> np.ndarray:
    assert editor.picture.layout.display == "block"
    return np.asarray(PIL.Image.open(BytesIO(editor.picture.value)).convert("RGB"))


def test_it_opens_with_the_first_category(editor):
    first = BANK.categories[0]
    assert editor.category.value == first and editor.text.value.splitlines() == BANK[first]
    assert "Rules broken: 0" in editor.checks.value and editor.bank == BANK
    assert picture(editor).std() > 10


def test_an_edit_reaches_bank_checks_and_picture(editor):
    first, before = BANK.categories[0], picture(editor)
    editor.text.value = "\n".join([*BANK[first][:-1], BANK[first][0] + "s"])
    assert "duplicate" in editor.checks.value and "Rules broken: 1" in editor.checks.value
    assert editor.bank[first] == [*BANK[first][:-1], BANK[first][0] + "s"] != BANK[first]
    assert editor.bank.provenance["hand_edits"] == [first]
    assert editor.bank[BANK.categories[1]] == BANK[BANK.categories[1]]
    assert "word" in editor.checks.value, "the tiny model has no plurals, and the widget says so instead of raising"
    editor.text.value = "\n".join([*BANK[first][1:], BANK[first][0]])
    assert "Rules broken: 0" in editor.checks.value
    assert picture(editor).shape != before.shape or (picture(editor) != before).any()


def test_errors_are_said_in_the_widget_and_the_old_picture_goes(editor):
    editor.text.value = "turquoise <b>head</b>"
    assert "turquoise" in editor.checks.value and "<b>head" not in editor.checks.value
    assert editor.picture.layout.display == "none"
    editor.text.value = " \n"
    assert "write at least one concept" in editor.checks.value


def test_edits_survive_a_change_of_category_and_can_be_undone(editor):
    first, second = BANK.categories[:2]
    editor.text.value = "red head"
    editor.category.value = second
    assert editor.text.value.splitlines() == BANK[second] and editor.bank[first] == ["red head"]
    editor.category.value = first
    assert editor.text.value == "red head"
    editor.reset.click()
    assert editor.text.value.splitlines() == BANK[first] and editor.bank == BANK
