"""Evaluation: the row against brute force, an oracle that knows the masks, controls that know nothing."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_birds import BANK, bank_without, bird_vlm, same, weights

from dealkit import ConceptBank, evaluate, explain, metrics
from dealkit.datasets import Birdworld
from dealkit.datasets.birdworld import COLOURS, PARTS
from dealkit.evaluation import centre_maps, image_table, part_table, random_maps, summarise

NAMES = ["accuracy", "concept_accuracy", "worst_group_accuracy", "overlap_cosine", "overlap_product",
         "disentanglability", "insertion_fidelity", "insertion_auc", "deletion_auc", "pointing_game",
         "mass_in_mask", "iou", "dead_maps", "insertion_auc_mean", "deletion_auc_mean", "best_iou"]
LATER = ["accuracy_by_concepts", "image_to_text_recall_1", "image_to_text_recall_5", "text_to_image_recall_1",
         "text_to_image_recall_5"]                                           # test_retrieval.py
OPTIONAL = ["point_hits", "point_mass", "infidelity", "max_sensitivity"]     # test_evaluation_options.py
MASKED = ["pointing_game", "mass_in_mask", "iou", "best_iou"]
INSERTED = ["insertion_fidelity", "insertion_auc", "deletion_auc", "insertion_auc_mean", "deletion_auc_mean"]


def knows_the_masks(birds, order=range(5)):
    """An explainer whose map of concept k is the true mask of part order[k]."""
    masks = {item["image"].numpy().tobytes(): item["part_masks"][list(order)] for item in birds}
    return lambda vlm, images, emb: torch.stack([masks[image.numpy().tobytes()] for image in images]).float()


def similarity(vlm, image, texts) -> list[float]:
    """Cosines of one image with some texts, from open_clip's own encoders, one text at a time."""
    with torch.no_grad():
        picture = vlm.model.encode_image(image[None])
        return [torch.cosine_similarity(picture, vlm.model.encode_text(vlm.tokenizer([text]))).item() for text in texts]


# ------------------------------------------------------------------------------------------------------------- the row


def test_the_row_has_the_columns_of_the_design(vlm, birds):
    row = evaluate(vlm, birds, BANK, insertion_images=4, perturbed_images=0)
    columns, optional, later = ([f"{name}{end}" for name in names for end in ("", "_low", "_high")]
                                for names in (NAMES, OPTIONAL, LATER))
    assert list(row.index) == [*columns, *optional, *later, "n"] and row["n"] == 32
    assert row[columns + later].notna().all() and row[optional].isna().all()
    for name in NAMES + LATER:
        assert row[f"{name}_low"] - 1e-9 <= row[name] <= row[f"{name}_high"] + 1e-9, name
    for name in {*NAMES, *LATER} - {"overlap_product", *INSERTED[1:]}:
        assert 0 <= row[name] <= 1, name


def test_accuracies_equal_brute_force(vlm, birds):
    correct, answers = [], []
    for item in birds:
        scores = similarity(vlm, item["image"], [f"a photo of a {name}" for name in birds.categories])
        correct.append(np.argmax(scores) == item["label"])
        for part, colour in zip(PARTS, item["attributes"]):
            scores = similarity(vlm, item["image"], [f"{c} {part}" for c in COLOURS])
            answers.append(np.argmax(scores) == int(colour))
    groups = np.array([item["group"] for item in birds])
    row = evaluate(vlm, birds, BANK, insertion_images=0)
    assert row["accuracy"] == pytest.approx(np.mean(correct))
    assert row["concept_accuracy"] == pytest.approx(np.mean(answers))
    assert row["worst_group_accuracy"] == pytest.approx(min(np.mean(np.array(correct)[groups == g]) for g in range(4)))


def test_a_perfect_and_a_shortcut_model_get_the_accuracies_they_deserve(birds):
    """An encoder that sees only the background is right about every bird at home, wrong about all others."""
    class Cheat:
        device, grid = torch.device("cpu"), (5, 5)

        def __init__(self, shortcut):
            self.shortcut, self.truth = shortcut, {i["image"].numpy().tobytes(): i for i in birds}

        def encode_text(self, texts):
            names = [t.split(" with ")[0].split()[-1] for t in texts]
            return torch.eye(16)[[birds.categories.index(n) if n in birds.categories else 0 for n in names]]

        def encode_image(self, images):
            found = [self.truth[image.numpy().tobytes()] for image in images]
            seen = [item["background"] if self.shortcut else item["label"] % 2 for item in found]
            return torch.eye(16)[[item["label"] // 2 * 2 + home for item, home in zip(found, seen)]]

    options = {"explainer": knows_the_masks(birds), "insertion_images": 0}
    honest, shortcut = (evaluate(Cheat(flag), birds, BANK, **options) for flag in (False, True))
    assert (honest["accuracy"], honest["worst_group_accuracy"]) == (1, 1)
    assert (shortcut["accuracy"], shortcut["worst_group_accuracy"]) == (.5, 0)


def test_the_metrics_of_maps_are_those_of_explain(vlm, birds):
    """Every image explained by itself with the concepts of its own category, against the mask each concept names."""
    table = image_table(vlm, birds, BANK, insertion_images=0)
    for i in (0, 7, 21, 31):
        item = birds[i]
        maps, masks = explain(vlm, item["image"][None], BANK[birds.categories[item["label"]]]), item["part_masks"][None]
        for name, value in {"overlap_cosine": metrics.overlap(maps, "cosine"), "iou": metrics.iou(maps, masks),
                            "overlap_product": metrics.overlap(maps, "product"), "dead_maps": metrics.dead_maps(maps),
                            "mass_in_mask": metrics.mass_in_mask(maps, masks),
                            "best_iou": metrics.best_iou(maps, masks),
                            "pointing_game": metrics.pointing_game(maps, masks)}.items():
            assert table.loc[i, name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        for part, value in zip(PARTS, metrics.mass_in_mask(maps, masks, reduction="none")[0]):
            assert table.loc[i, f"mass_in_mask/{part}"] == pytest.approx(float(value), rel=1e-4)
    row = summarise(table)
    expected = 1 / (1 + np.exp(-10 * (.2 - table["overlap_product"].mean() / 100)))
    assert row["disentanglability"] == pytest.approx(expected)
    parts = part_table(table)
    assert list(parts.columns) == list(PARTS) and set(parts.index) == set(MASKED)
    assert parts.loc["iou", "tail"] == pytest.approx(table["iou/tail"].mean())
    assert parts.loc["mass_in_mask"].mean() == pytest.approx(row["mass_in_mask"])


def test_insertion_and_deletion_pair_each_image_with_its_own_concepts(vlm, birds):
    table = image_table(vlm, birds, BANK, insertion_images=4, batch_size=10)
    probed = table.index[table["insertion_auc"].notna()].tolist()
    assert probed == [0, 10, 21, 31]                                     # evenly spread
    for i in probed[1:3]:
        item = birds[i]
        concepts = BANK[birds.categories[item["label"]]]
        maps = explain(vlm, item["image"][None], concepts)
        score = lambda x, k: torch.tensor([similarity(vlm, image, [concepts[k]])[0] for image in x])  # noqa: B023, E731
        for name in INSERTED:
            baseline = {"baseline": "mean"} if name.endswith("_mean") else {}
            expected = getattr(metrics, name.removesuffix("_mean"))(score, item["image"][None], maps, **baseline)
            assert table.loc[i, name] == pytest.approx(expected, abs=1e-3)


# ------------------------------------------------------------------------------------------------ oracles and controls


def test_an_explainer_that_knows_the_masks_scores_one(vlm, birds):
    row = evaluate(vlm, birds, BANK, explainer=knows_the_masks(birds), insertion_images=0)
    assert [row[name] for name in MASKED] == pytest.approx([1, 1, 1, 1])
    assert row["overlap_cosine"] == row["overlap_product"] == row["dead_maps"] == 0


def test_an_explainer_that_takes_one_part_for_another_scores_nothing(vlm, birds):
    row = evaluate(vlm, birds, BANK, explainer=knows_the_masks(birds, (1, 2, 3, 4, 0)), insertion_images=0)
    assert [row[name] for name in MASKED[:3]] == pytest.approx([0, 0, 0], abs=1e-6)
    assert row["best_iou"] < .1                                          # the whole image, where nothing else is right


def test_a_mask_is_found_by_the_part_that_a_concept_names(vlm, birds):
    """Neither the order nor the number of concepts matters; one that names no part is left out."""
    bank = ConceptBank("birds", {name: [c[3], "a bird", c[0]] for name, c in BANK.items()})
    oracle = knows_the_masks(birds, (3, 2, 0))
    table = image_table(vlm, birds, bank, explainer=oracle, insertion_images=0)
    assert summarise(table)[MASKED].tolist() == pytest.approx([1, 1, 1, 1])
    assert table["iou/belly"].isna().all() and (table["iou/tail"] > .99).all()


def test_controls_score_chance(vlm):
    birds = Birdworld("test", n=128)
    area = birds.batch(range(128))["part_masks"].float().mean().item()
    noise = evaluate(vlm, birds, BANK, explainer=random_maps, insertion_images=0)
    assert abs(noise["mass_in_mask"] - area) < .01 and noise["pointing_game"] < 3 * area
    centre = evaluate(vlm, birds, BANK, explainer=centre_maps, insertion_images=0)
    assert centre["overlap_cosine"] == pytest.approx(1) and centre["mass_in_mask"] < 5 * area
    assert centre["pointing_game"] < .2 + 1e-6                           # one place cannot be in two parts
    assert noise["dead_maps"] == centre["dead_maps"] == 0


def test_random_maps_differ_between_images_and_concepts(vlm, birds):
    images = birds.batch(range(32))["image"]
    maps = random_maps(vlm, images, torch.zeros(32, 5, 24)).flatten(0, 1)
    assert len({m.numpy().tobytes() for m in maps}) == 160


# --------------------------------------------------------------------------------------------- what must play no part


@pytest.mark.parametrize("explainer", [None, random_maps, centre_maps])
def test_the_batch_size_changes_nothing(vlm, birds, explainer):
    tables = [image_table(vlm, birds, BANK, explainer=explainer, insertion_images=2, perturbed_images=2,
                          batch_size=size) for size in (32, 5)]
    tables = [table.reindex(sorted(table), axis=1).to_numpy(float) for table in tables]
    assert np.allclose(*tables, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_model_is_left_as_it_was(birds):
    vlm = bird_vlm()
    vlm.model.visual.conv1.weight.requires_grad_(False)
    before, flags = weights(vlm), [p.requires_grad for p in vlm.model.parameters()]
    with torch.no_grad():                                                # also where gradients are switched off
        first = evaluate(vlm, birds, BANK, insertion_images=1)
    second = evaluate(vlm, birds, BANK, insertion_images=1)
    assert same(before, weights(vlm)) and flags == [p.requires_grad for p in vlm.model.parameters()]
    assert all(p.grad is None for p in vlm.model.parameters()) and not vlm.model.training
    assert first.equals(second)


# ----------------------------------------------------------------------------------------------------- what is missing


def test_without_masks_nothing_reads_them(vlm, birds):
    class Hidden(torch.utils.data.Dataset):
        """The same birds, without any mask."""
        categories, concept_options = birds.categories, birds.concept_options
        __len__ = birds.__len__

        def __getitem__(self, index):
            return {name: value for name, value in birds[index].items() if name != "part_masks"}

    told = evaluate(vlm, birds, BANK, masks=False, insertion_images=0)
    hidden = evaluate(vlm, Hidden(), BANK, insertion_images=0)
    for row in (told, hidden):
        columns = [f"{name}{end}" for name in MASKED + INSERTED + OPTIONAL for end in ("", "_low", "_high")]
        assert row[columns].isna().all() and row.drop(columns).notna().all()
    assert told.equals(hidden)


def test_a_plain_data_set_gets_what_is_defined(vlm, birds):
    class Plain(torch.utils.data.Dataset):
        categories = birds.categories
        __len__ = birds.__len__

        def __getitem__(self, index):
            return {name: birds[index][name] for name in ("image", "label")}

    row = evaluate(vlm, Plain(), BANK, insertion_images=0)
    assert row[["concept_accuracy", "worst_group_accuracy", *MASKED]].isna().all()
    assert row[["accuracy", "overlap_cosine", "dead_maps"]].notna().all()


def test_a_single_concept_has_no_overlap(vlm, birds):
    bank = ConceptBank("birds", {name: concepts[:1] for name, concepts in BANK.items()})
    row = evaluate(vlm, birds, bank, insertion_images=0)
    assert row[["overlap_cosine", "overlap_product", "disentanglability"]].isna().all() and row["iou"] >= 0


def test_bad_input_is_named(vlm, birds):
    with pytest.raises(KeyError, match="pelmar"):
        evaluate(vlm, birds, bank_without("pelmar"))
    with pytest.raises(ValueError, match="no category"):
        evaluate(vlm, Birdworld(n=16, random_birds=.9), BANK)


def test_an_empty_data_set_is_an_error():
    empty = torch.utils.data.Subset(Birdworld(n=2), [])
    empty.categories = Birdworld.categories
    with pytest.raises(ValueError, match="data set is empty"):
        evaluate(bird_vlm(), empty, BANK)
