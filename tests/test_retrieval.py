"""Retrieval between images and captions, and zero-shot by concepts: against loops, by hand, and at their bounds."""
from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_birds import BANK, bird_vlm

from dealkit import ConceptBank, evaluate, metrics
from dealkit.controls import evaluate_wrong_concepts
from dealkit.evaluation import embed, image_table, labels_of, random_maps, retrieval, summarise
from dealkit.evaluation import ranks as ranks_module
from dealkit.evaluation.ranks import caption_embeddings, ranks
from dealkit.metrics import first_relevant

WAYS = ("image_to_text", "text_to_image")


def cosines(vlm, image, texts) -> list[float]:
    """Of one image with some texts, from open_clip's own encoders, one text at a time."""
    with torch.no_grad():
        picture = vlm.model.encode_image(image[None])
        return [torch.cosine_similarity(picture, vlm.model.encode_text(vlm.tokenizer([text]))).item() for text in texts]


def found_among(scores: list[float], right: list[bool], k: int) -> bool:
    order = sorted(range(len(scores)), key=lambda i: scores[i], reverse=True)
    return any(right[i] for i in order[:k])


# ----------------------------------------------------------------------------------------------------- the rankings


@pytest.mark.parametrize("at_once", [1, 60, 10_000])
def test_ranks_equal_the_metric_and_do_not_depend_on_the_portions(monkeypatch, at_once):
    monkeypatch.setattr(ranks_module, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    images, captions = torch.randn(50, 6, generator=generator), torch.randn(8, 6, generator=generator)
    images[7], images[21] = images[3], 2 * images[3]                     # equal scores, up to a factor
    labels = torch.arange(50) % 7                                        # nobody is of the last category
    places = ranks(images, captions, labels)
    scores = torch.nn.functional.normalize(images, dim=1) @ torch.nn.functional.normalize(captions, dim=1).T
    same = labels[:, None] == torch.arange(8)
    assert places["caption_rank"].tolist() == first_relevant(scores, same).tolist()
    best = [min(places["image_rank"][labels == c].tolist()) for c in range(7)]
    assert best == first_relevant(scores.T, same.T)[:7].tolist()
    for i in range(50):                                                  # every image, not only the best one
        c = int(labels[i])
        ahead = sum(scores[j, c] >= scores[i, c] for j in range(50) if labels[j] != c)
        assert places["image_rank"][i] == 1 + ahead


def test_values_that_are_not_finite_are_named():
    images, captions, labels = torch.rand(3, 4), torch.rand(2, 4), torch.tensor([0, 1, 1])
    for spoilt in (images.clone(), captions.clone()):
        spoilt[1, 2] = torch.nan
        with pytest.raises(ValueError, match="embeddings of (images|captions) hold NaN"):
            ranks(*(spoilt if spoilt.shape == good.shape else good for good in (images, captions)), labels)


# ---------------------------------------------------------------------------------------------------- evaluation of it


@pytest.fixture(scope="module")
def scores(vlm, birds) -> np.ndarray:
    """Cosines [32, 16] of every bird with every caption."""
    captions = [f"a photo of a {name} with {', '.join(BANK[name])}" for name in birds.categories]
    return np.array([cosines(vlm, bird["image"], captions) for bird in birds])


def test_recalls_of_the_row_equal_brute_force(vlm, birds, scores):
    row, labels = evaluate(vlm, birds, BANK, insertion_images=0), np.array([bird["label"] for bird in birds])
    for k in (1, 5):
        found = [found_among(s, [c == label for c in range(16)], k) for s, label in zip(scores.tolist(), labels)]
        assert row[f"image_to_text_recall_{k}"] == pytest.approx(np.mean(found))
        interval = metrics.bootstrap_interval(np.array(found, float))
        assert (row[f"image_to_text_recall_{k}_low"], row[f"image_to_text_recall_{k}_high"]) == interval
        found = [found_among(scores[:, c].tolist(), (labels == c).tolist(), k) for c in range(16)]
        assert row[f"text_to_image_recall_{k}"] == pytest.approx(np.mean(found))
        assert row[f"text_to_image_recall_{k}_high"] == metrics.bootstrap_interval(np.array(found, float))[1]
    assert 0 < row["image_to_text_recall_5"] < 1 and 0 < row["text_to_image_recall_5"] < 1


def test_accuracy_by_concepts_equals_brute_force(vlm, birds):
    table, correct = image_table(vlm, birds, BANK, insertion_images=0), []
    for bird in birds:
        means = [np.mean(cosines(vlm, bird["image"], BANK[name])) for name in birds.categories]
        correct.append(np.argmax(means) == bird["label"])
    assert table["correct_by_concepts"].tolist() == correct and 0 < sum(correct) < 32
    row = summarise(table)
    assert row["accuracy_by_concepts"] == pytest.approx(np.mean(correct))
    assert row["accuracy_by_concepts_low"] == metrics.bootstrap_interval(np.array(correct, float))[0]


def test_the_function_says_what_the_row_says(vlm, birds):
    row = evaluate(vlm, birds, BANK, insertion_images=0, explainer=random_maps)
    alone = retrieval(embed(vlm, birds), labels_of(birds), vlm, BANK, birds.categories)
    names = [f"{way}_recall_{k}{end}" for way in WAYS for k in (1, 5, 10) for end in ("", "_low", "_high")]
    assert list(alone.index) == [*names, "n", "n_texts"] and (alone["n"], alone["n_texts"]) == (32, 16)
    both = [name for name in names if "_10" not in name]
    assert alone[both].tolist() == row[both].tolist()
    assert alone["image_to_text_recall_10"] >= alone["image_to_text_recall_5"] >= alone["image_to_text_recall_1"]


def test_perfect_embeddings_find_everything_and_opposite_ones_nothing(birds):
    class Axes:
        """A text tower that puts every category's caption on an axis of its own."""
        def encode_text(self, texts):
            return torch.eye(16)[[birds.categories.index(t.split(" with ")[0].split()[-1]) for t in texts]]

    labels = torch.arange(32) % 16
    perfect = retrieval(torch.eye(16)[labels], labels, Axes(), BANK, birds.categories, ks=(1,))
    assert perfect["image_to_text_recall_1"] == perfect["text_to_image_recall_1"] == 1
    wrong = retrieval(-torch.eye(16)[labels], labels, Axes(), BANK, birds.categories, ks=(1, 15, 16))
    assert wrong["image_to_text_recall_15"] == 0 and wrong["image_to_text_recall_16"] == 1
    assert wrong["text_to_image_recall_1"] == 0
    few = labels % 3                                                     # 13 captions have nothing to find
    some = retrieval(torch.eye(16)[few], few, Axes(), BANK, birds.categories, ks=(1,))
    assert some["n_texts"] == 3 and some["text_to_image_recall_1"] == 1


def test_a_wrong_concept_as_a_control_leaves_texts_alone(vlm, birds):
    own, wrong = (make(vlm, birds, BANK, insertion_images=0) for make in (evaluate, evaluate_wrong_concepts))
    names = ["accuracy", "accuracy_by_concepts", *(f"{way}_recall_{k}" for way in WAYS for k in (1, 5))]
    assert own[names].equals(wrong[names]) and own["overlap_cosine"] != wrong["overlap_cosine"]


def test_a_table_of_an_older_version_is_still_summed_up(vlm, birds):
    table = image_table(vlm, birds, BANK, insertion_images=0)
    old = summarise(table.drop(columns=["correct_by_concepts", "caption_rank", "image_rank"]))
    new = summarise(table)
    later = [name for name in new.index if "recall" in name or "by_concepts" in name]
    assert len(later) == 15 and old[later].isna().all() and new[later].notna().all()
    assert list(old.index) == list(new.index) and old.drop(later).equals(new.drop(later))


# ---------------------------------------------------------------------------------------------- captions and what fails


def test_a_caption_that_is_too_long_keeps_the_concepts_that_fit(birds):
    vlm = bird_vlm()
    long = {name: list(BANK[name]) for name in BANK}
    long["pelmar"] = [*BANK["pelmar"][:2], "a purple wing with a green bird with a red wing", "blue tail", "red beak"]
    with pytest.warns(UserWarning, match=r"captions of 1 of 16 categories are too long .*'pelmar' \(2 of 5\)\."):
        emb = caption_embeddings(vlm, long, "a photo of a {}")
    for name, used in (("zorvit", 5), ("pelmar", 2)):
        expected = vlm.encode_text([f"a photo of a {name} with {', '.join(long[name][:used])}"])[0]
        assert torch.allclose(emb[list(long).index(name)], expected, atol=1e-6)
    bare = "a photo of a bird of a bird of a bird of a bird of a {}"                # leaves room for no concept
    with pytest.warns(UserWarning, match=r"16 of 16 .*'zorvit' \(0 of 5\), 'pelmar' \(0 of 5\), .*, \.\.\."):
        emb = caption_embeddings(vlm, BANK, bare)
    assert torch.allclose(emb, vlm.encode_text([bare.format(name) for name in BANK]), atol=1e-6)
    with pytest.raises(ValueError, match="longer than the model's context"):
        caption_embeddings(vlm, BANK, bare + " bird" * 9)
    with pytest.raises(ValueError, match="no word for 'kite'"):
        caption_embeddings(vlm, {"kite": ["red tail"]}, "a photo of a {}")


def test_many_texts_are_encoded_in_portions(vlm, birds, monkeypatch):
    whole, row = caption_embeddings(vlm, BANK, "a photo of a {}"), evaluate(vlm, birds, BANK, insertion_images=0)
    monkeypatch.setattr(ranks_module, "TEXTS_AT_ONCE", 5)
    sizes, encode = [], vlm.encode_text
    vlm.encode_text = lambda texts: (sizes.append(len(texts)), encode(texts))[1]
    try:
        torch.testing.assert_close(caption_embeddings(vlm, BANK, "a photo of a {}"), whole)
        assert sizes == [5, 5, 5, 1]
        pd.testing.assert_series_equal(evaluate(vlm, birds, BANK, insertion_images=0), row)
        assert max(sizes) == 6                                           # what the colours of a part are chosen from
    finally:
        del vlm.encode_text


def test_what_does_not_fit_is_named(vlm, birds):
    emb, labels = torch.rand(4, 24), torch.tensor([0, 1, 2, 15])
    call = lambda emb=emb, labels=labels, bank=BANK, **options: retrieval(  # noqa: E731
        emb, labels, vlm, bank, birds.categories, **options)
    assert call()["n_texts"] == 4
    for options, error, message in (
            ({"emb": emb[:, :9]}, ValueError, r"embeddings have shape \(4, 9\); expected \[N, 24\]"),
            ({"labels": labels[:3]}, ValueError, r"labels are torch.int64 of shape \(3,\); .*each of 4 images"),
            ({"labels": labels.float()}, ValueError, "labels are torch.float32"),
            ({"labels": labels + 1}, ValueError, "labels run from 1 to 16, but there are 16 categories"),
            ({"labels": labels - 1}, ValueError, "labels run from -1"),
            ({"ks": (0, 1)}, ValueError, r"ks are \(0, 1\); expected whole numbers"),
            ({"ks": ()}, ValueError, r"ks are \(\)"),
            ({"emb": emb * math.nan}, ValueError, "embeddings of images hold NaN"),
            ({"bank": {"zorvit": ["red head"]}}, KeyError, "pelmar")):
        with pytest.raises(error, match=message):
            call(**options)


def test_labels_beyond_the_categories_are_an_error(vlm, birds):
    few = torch.utils.data.Subset(birds, range(8))
    few.categories, few.parts = birds.categories[:4], birds.parts
    with pytest.raises(ValueError, match="labels run from 0 to 7, but there are 4 categories"):
        evaluate(vlm, few, BANK, insertion_images=0)


def test_banks_of_unequal_lists_are_cut_with_one_warning(vlm, birds):
    uneven = ConceptBank("birds", {name: c[:3] if name == "fendal" else c for name, c in BANK.items()})
    with pytest.warns(UserWarning, match="15 of 16 categories have more concepts") as caught:
        row = retrieval(embed(vlm, birds), labels_of(birds), vlm, uneven, birds.categories)
    assert len(caught) == 1 and caught[0].filename == __file__
    three = ConceptBank("birds", {name: c[:3] for name, c in BANK.items()})
    pd.testing.assert_series_equal(row, retrieval(embed(vlm, birds), labels_of(birds), vlm, three, birds.categories))
