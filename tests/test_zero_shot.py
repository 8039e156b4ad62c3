"""Zero-shot by name and by concepts, and the worst group: against the row of `evaluate`, and by hand."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_birds import BANK

from dealkit import ConceptBank, evaluate, metrics
from dealkit.datasets import Birdworld
from dealkit.evaluation import embed, image_table, labels_of, zero_shot


def test_zero_shot_equals_the_row_and_brute_force(vlm, birds):
    row, emb, labels = evaluate(vlm, birds, BANK, insertion_images=0), embed(vlm, birds), labels_of(birds)
    by_name = zero_shot(emb, vlm.encode_text([f"a photo of a {name}" for name in birds.categories]), labels,
                        labels_of(birds, "group"))
    names = [f"{name}{end}" for name in ("accuracy", "worst_group_accuracy") for end in ("", "_low", "_high")]
    assert list(by_name.index) == [*names, "n"] and by_name[names].tolist() == row[names].tolist()
    concepts = torch.stack([vlm.encode_text(BANK[name]) for name in birds.categories]).detach()      # [16, 5, 24]
    cosines = torch.cosine_similarity(emb[:, None, None], concepts, dim=-1)                          # [32, 16, 5]
    by_concepts = zero_shot(emb, 3 * concepts, labels)                   # lengths do not count
    assert by_concepts["accuracy"] == (cosines.mean(2).argmax(1) == labels).double().mean() == \
        row["accuracy_by_concepts"]
    assert np.isnan(by_concepts[names[3:]].astype(float)).all() and by_concepts["n"] == 32
    # a text that is shorter than another must not count less in the mean
    uneven = concepts * torch.linspace(.1, 9, 5)[:, None]
    assert zero_shot(emb, uneven, labels)["accuracy"] == by_concepts["accuracy"]


def test_many_images_go_through_in_portions():
    generator = torch.Generator().manual_seed(0)
    emb, texts = torch.randn(9000, 8, generator=generator), torch.randn(5, 8, generator=generator)
    labels = torch.randint(5, (9000,), generator=generator)
    expected = metrics.accuracy(torch.cosine_similarity(emb[:, None], texts[None], dim=-1), labels)
    assert zero_shot(emb, texts, labels)["accuracy"] == pytest.approx(expected)


EMB, TEXTS, LABELS = torch.rand(3, 4), torch.rand(2, 4), torch.tensor([0, 1, 1])


@pytest.mark.parametrize("call, message", [
    (lambda: zero_shot(EMB[:, :3], TEXTS, LABELS), r"embeddings have shape \(3, 3\), those of the texts \(2, 4\)"),
    (lambda: zero_shot(EMB, TEXTS[0], LABELS), r"text embeddings have shape \(4,\)"),
    (lambda: zero_shot(EMB, TEXTS[:, None][:, :0], LABELS), r"text embeddings have shape \(2, 0, 4\)"),
    (lambda: zero_shot(EMB, TEXTS * math.nan, LABELS), "text embeddings hold NaN"),
    (lambda: zero_shot(EMB * math.nan, TEXTS, LABELS), "scores hold NaN"),
    (lambda: zero_shot(EMB, TEXTS, LABELS[:2]), "labels are .* each of 3 images"),
    (lambda: zero_shot(EMB, TEXTS, LABELS + 1), "labels run from 1 to 2, but there are 2 categories"),
    (lambda: zero_shot(EMB, TEXTS, LABELS, LABELS[:2]), r"groups have shape \(2,\); expected one for each of 3"),
])
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Water(torch.utils.data.Dataset):
    """Birdworld as Waterbirds: land and water birds, before either ground, 0 to 3 a group; no masks and no parts."""
    categories = ["zorvit", "pelmar"]

    def __init__(self, birds):
        self.birds = birds

    def __len__(self):
        return len(self.birds)

    def __getitem__(self, index):
        bird = self.birds[index]
        label = bird["label"] % 2
        return {"image": bird["image"], "label": label, "background": bird["background"],
                "group": 2 * label + bird["background"]}


def test_waterbirds_have_a_worst_group(vlm):
    data = Water(Birdworld("train", n=160, seed=3))
    row = evaluate(vlm, data, BANK, insertion_images=0)
    emb, texts = embed(vlm, data), vlm.encode_text([f"a photo of a {name}" for name in data.categories]).detach()
    right = [int((texts @ emb[i]).argmax()) == data[i]["label"] for i in range(160)]
    groups = {g: [r for r, item in zip(right, data) if item["group"] == g] for g in range(4)}
    assert min(map(len, groups.values())) >= 1 and row["n"] == 160
    worst = min(np.mean(answers) for answers in groups.values())
    assert row["worst_group_accuracy"] == pytest.approx(worst) and worst < np.mean(right)
    alone = zero_shot(emb, texts, labels_of(data), labels_of(data, "group"))
    assert alone["worst_group_accuracy"] == pytest.approx(worst)
    assert row["worst_group_accuracy_low"] <= worst <= row["worst_group_accuracy_high"]
    assert row[["pointing_game", "mass_in_mask", "iou", "best_iou", "point_hits", "concept_accuracy"]].isna().all()
    assert row[["overlap_cosine", "accuracy_by_concepts", "text_to_image_recall_1"]].notna().all()


def test_the_worst_group_may_be_the_first_and_images_of_no_group_are_left_out():
    texts, emb = torch.eye(2), torch.tensor([[1., 0.], [0., 1.], [0., 1.], [1., 0.], [0., 1.]])
    row = zero_shot(emb, texts, torch.tensor([0, 0, 1, 0, 0]), torch.tensor([0, 0, 1, 1, -1]))      # -1: wrong
    assert row["accuracy"] == .6 and row["worst_group_accuracy"] == .5
    none = zero_shot(emb, texts, torch.tensor([0, 0, 1, 0, 0]), torch.full((5,), -1))
    assert math.isnan(none["worst_group_accuracy"]) and none["accuracy"] == .6


def test_a_group_may_be_missing_and_a_bank_may_have_more_categories(vlm):
    data = Water(torch.utils.data.Subset(Birdworld("test", n=32), range(16)))            # land only
    row = evaluate(vlm, data, ConceptBank("two", {name: BANK[name] for name in BANK}), insertion_images=0)
    table = image_table(vlm, data, BANK, insertion_images=0)
    assert set(table["group"]) == {0, 2} and set(table["caption_rank"]) <= {1, 2}
    assert row["worst_group_accuracy"] == table.groupby("group")["correct"].mean().min()
