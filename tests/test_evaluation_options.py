"""Evaluation beyond Birdworld's defaults: points, noise, other concepts, and data sets and banks that do not fit."""
from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from tiny_birds import BANK, bird_vlm

from dealkit import ConceptBank, DealConfig, evaluate, explain, finetune, metrics
from dealkit.datasets import Birdworld
from dealkit.evaluation import centre_maps, image_table, part_table, random_maps, summarise, uniform_maps
from dealkit.evaluation.columns import cosine_with, named_parts
from dealkit.inputs import concept_lists


class WithPoints(torch.utils.data.Dataset):
    """Birdworld as CUB would have it: instead of a mask, the centre of each part that can be seen."""
    categories, parts = Birdworld.categories, ["head", "left wing", "belly", "tail", "beak"]

    def __init__(self, birds):
        self.birds = birds

    def __len__(self):
        return len(self.birds)

    def __getitem__(self, index):
        item = dict(self.birds[index])
        masks = item.pop("part_masks")
        points = [mask.nonzero().float().mean(0).flip(0) + .5 if mask.any() else torch.full((2,), math.nan)
                  for mask in masks]
        return item | {"part_points": torch.stack(points)}


def without_attributes(dataset, *names):
    """The same items, with only these attributes."""
    plain = torch.utils.data.Subset(dataset, range(len(dataset)))
    for name in names:
        setattr(plain, name, getattr(dataset, name))
    return plain


# -------------------------------------------------------------------------------------------------------------- points


def test_a_data_set_with_points_gets_the_metrics_of_points(vlm, birds):
    dataset = WithPoints(birds)
    table = image_table(vlm, dataset, BANK, insertion_images=0)
    for i in (0, 9, 31):
        item = dataset[i]
        maps = explain(vlm, item["image"][None], BANK[birds.categories[item["label"]]])
        for name in ("point_hits", "point_mass"):
            value = getattr(metrics, name)(maps, item["part_points"][None], (80, 80), reduction="none")[0]
            assert table.loc[i, name] == pytest.approx(value.double().nanmean().item(), rel=1e-4)
            for part, one in zip(dataset.parts, value):
                assert table.loc[i, f"{name}/{part}"] == pytest.approx(one.item(), rel=1e-4, nan_ok=True)
    assert table[["pointing_game", "mass_in_mask", "iou", "best_iou"]].isna().all(axis=None)
    assert set(part_table(table).index) == {"point_hits", "point_mass"}
    assert image_table(vlm, dataset, BANK, insertion_images=0, masks=False)["point_mass"].isna().all()


def test_points_at_their_bounds_and_with_another_radius(vlm, birds):
    points = {item["image"].numpy().tobytes(): item["part_points"] for item in WithPoints(birds)}

    def oracle(vlm, images, emb):
        """A spot on every point."""
        y, x = torch.meshgrid(torch.arange(80) + .5, torch.arange(80) + .5, indexing="ij")
        where = torch.stack([points[image.numpy().tobytes()] for image in images]).nan_to_num(0)
        return ((x - where[..., 0, None, None]).hypot(y - where[..., 1, None, None]) < 2).float()

    best = evaluate(vlm, WithPoints(birds), BANK, explainer=oracle, insertion_images=0)
    assert best["point_hits"] == best["point_mass"] == 1
    uniform = [evaluate(vlm, WithPoints(birds), BANK, explainer=uniform_maps, insertion_images=0, point_radius=radius)
               for radius in (.1, .2)]
    assert uniform[0]["point_mass"] == pytest.approx(math.pi * .1 ** 2, rel=.05)
    assert 3 < uniform[1]["point_mass"] / uniform[0]["point_mass"] <= 4.1          # some discs leave the image


def test_a_part_is_named_by_its_last_word_with_or_without_an_s():
    parts = ["left leg", "right leg", "tail", "beak"]
    named = named_parts([["yellow legs", "a forked tail"], ["long beak and red leg", "legless"]], parts)
    assert named.tolist() == [[[True, True, False, False], [False, False, True, False]],
                              [[True, True, False, True], [False] * 4]]
    other = named_parts([["hooked bill", "white bills", "buff chest", "a billboard"]], ["beak", "breast"])
    assert other.tolist() == [[[True, False], [True, False], [False, True], [False, False]]]


def test_a_concept_that_names_two_parts_is_looked_for_in_both(vlm, birds):
    bank = ConceptBank("birds", {name: ["a head with a beak", "red tail"] for name in BANK})
    both = {item["image"].numpy().tobytes(): (item["part_masks"][0] | item["part_masks"][4], item["part_masks"][3])
            for item in birds}

    def oracle(vlm, images, emb):
        return torch.stack([torch.stack(both[image.numpy().tobytes()]) for image in images]).float()

    table = image_table(vlm, birds, bank, explainer=oracle, insertion_images=0)
    for name in ("pointing_game", "mass_in_mask", "iou", "best_iou", "iou/beak", "iou/head", "iou/tail"):
        assert table[name].mean() == pytest.approx(1), name
    assert table["iou/wing"].isna().all()


# ------------------------------------------------------------------------------------------------------- other options


def test_infidelity_and_max_sensitivity_are_those_of_the_metrics(vlm, birds):
    table = image_table(vlm, birds, BANK, insertion_images=0, perturbed_images=3, batch_size=20)
    columns = ["infidelity", "max_sensitivity"]
    assert table.index[table[columns].notna().all(axis=1)].tolist() == [0, 16, 31]
    assert table[columns].notna().sum().tolist() == [3, 3]
    for i in (16, 31):
        image, texts = birds[i]["image"][None], BANK[birds.categories[birds[i]["label"]]]
        text_emb = vlm.encode_text(texts).detach()
        score = lambda x, k: (vlm.encode_image(x) @ text_emb[k])  # noqa: B023, E731
        assert table["infidelity"][i] == pytest.approx(metrics.infidelity(score, image, explain(vlm, image, texts)),
                                                       rel=1e-3)
        moved = metrics.max_sensitivity(lambda x: explain(vlm, x, texts), image)  # noqa: B023
        assert table["max_sensitivity"][i] == pytest.approx(moved, rel=1e-2)
    noise = image_table(vlm, birds, BANK, explainer=random_maps, insertion_images=0, perturbed_images=3)
    assert noise["max_sensitivity"].mean() > .5 > table["max_sensitivity"].mean()   # new noise for every new image
    still = image_table(vlm, birds, BANK, explainer=uniform_maps, insertion_images=0, perturbed_images=3)
    assert still["max_sensitivity"].mean() == 0


def test_a_score_encodes_the_images_of_its_last_call_once(vlm, birds):
    class Counting:
        calls = 0

        def encode_image(self, images):
            self.calls += 1
            return vlm.encode_image(images)

    counting, images = Counting(), birds.batch(range(3))["image"]
    emb = torch.randn(3, 4, 24, generator=torch.Generator().manual_seed(0))
    score = cosine_with(counting, emb)
    expected = torch.cosine_similarity(vlm.encode_image(images)[:, None], emb, dim=-1)
    assert torch.allclose(torch.stack([score(images, k) for k in range(4)], dim=1), expected) and counting.calls == 1
    assert torch.allclose(score(images.flip(0), 2), torch.cosine_similarity(vlm.encode_image(images.flip(0)),
                                                                            emb[:, 2])) and counting.calls == 2


def test_other_concepts_are_explained_and_held_against_the_masks_of_these(vlm, birds):
    other = {name: ["red tail", "blue tail", "green tail", "red wing", "red beak"] for name in BANK}
    table = image_table(vlm, birds, BANK, insertion_images=0, explained=other)
    own = image_table(vlm, birds, BANK, insertion_images=0)
    assert table["correct"].equals(own["correct"]) and not np.allclose(table["mass_in_mask"], own["mass_in_mask"])
    item = birds[7]
    value = metrics.mass_in_mask(explain(vlm, item["image"][None], other["zorvit"]), item["part_masks"][None])
    assert table["mass_in_mask"][7] == pytest.approx(value, rel=1e-4)
    with pytest.raises(ValueError, match="explained has fewer than 5 concepts for 'zorvit'"):
        evaluate(vlm, birds, BANK, explained=dict.fromkeys(BANK, ["red tail"]))


def test_a_uniform_map_scores_the_area(vlm, birds):
    masks = birds.batch(range(32))["part_masks"]
    area = masks.float().mean(dim=(2, 3))[masks.any(dim=3).any(dim=2)].mean().item()
    row = evaluate(vlm, birds, BANK, explainer=uniform_maps, insertion_images=0)
    assert row["mass_in_mask"] == pytest.approx(row["best_iou"]) == pytest.approx(area, rel=.02)
    assert row["pointing_game"] == row["iou"] == row["overlap_cosine"] == 0 and row["dead_maps"] == 1


def test_the_worst_group_may_be_the_first_and_images_of_no_group_are_left_out(vlm, birds):
    table = image_table(vlm, birds, BANK, insertion_images=0, masks=False).iloc[:8]
    table = table.assign(group=[0, 0, 0, 0, 1, 1, -1, -1], correct=[1, 0, 0, 0, 1, 0, 0, 0])        # -1: 0 of 2
    row = summarise(table)
    assert row["worst_group_accuracy"] == .25 and row["accuracy"] == .25
    assert row["worst_group_accuracy_low"] == 0 and .25 < row["worst_group_accuracy_high"] <= 1
    assert summarise(table.assign(group=[2, 2, 2, 2, 1, 1, 1, 1]))["worst_group_accuracy"] == .25
    assert math.isnan(summarise(table.assign(group=-1))["worst_group_accuracy"])


def test_a_centre_map_has_its_only_peak_in_the_middle(vlm, birds):
    one, two = centre_maps(vlm, birds.batch([0])["image"], torch.zeros(2, 24))[0]
    assert torch.equal(one, two) and one.argmax() == 12 and (one.flatten() == one.max()).sum() == 1     # of 5 x 5
    assert one[0, 0] == one.min() > 0 and torch.equal(one, one.T) and torch.equal(one, one.flip(0))


# -------------------------------------------------------------------------------------------------- what does not fit


UNEVEN = ConceptBank("birds", {name: concepts[:3] if name == "fendal" else concepts for name, concepts in BANK.items()})


def test_concepts_that_are_left_out_are_counted_in_one_warning(vlm, birds):
    config = DealConfig(lr=1e-3, batch_size=16)
    message = r"15 of 16 categories have more concepts than 'fendal' with its 3 \(zorvit, pelmar, tirrun, \.\.\.\)"
    for call in (lambda: evaluate(vlm, birds, UNEVEN, insertion_images=0),
                 lambda: finetune(bird_vlm(), Birdworld(n=16), UNEVEN, config, progress=False)):
        with pytest.warns(UserWarning, match=message) as caught:
            call()
        assert len([w for w in caught if "concepts" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert concept_lists(BANK, list(BANK)) == (dict(BANK), 5)
        assert concept_lists(UNEVEN, ["fendal"])[1] == 3     # nothing is left out among these


@pytest.mark.parametrize("call", [lambda data: evaluate(bird_vlm(), data, BANK),
                                  lambda data: finetune(bird_vlm(), data, BANK, DealConfig())])
def test_a_subset_without_categories_is_told_how_to_pass_them(birds, call):
    with pytest.raises(TypeError, match=r"a Subset, has no `categories`; expected a list of str.* Birdworld inside it"):
        call(without_attributes(birds))
    with pytest.raises(TypeError, match=r"a list, has no `categories`;.*dataset.categories = \[\.\.\.\]"):
        call([birds[0]])


def test_masks_without_names_are_an_error(vlm, birds):
    with pytest.raises(TypeError, match=r"has no `parts`; expected a list of str, the name of each mask"):
        evaluate(vlm, without_attributes(birds, "categories"), BANK)
    passed = without_attributes(birds, "categories", "parts")
    assert evaluate(vlm, passed, BANK, insertion_images=0)["iou"] == \
        pytest.approx(evaluate(vlm, birds, BANK, insertion_images=0)["iou"])
    passed.parts = ["head", "wing"]
    with pytest.raises(ValueError, match=r"5 part_masks, but the data set names 2 parts: head, wing"):
        evaluate(vlm, passed, BANK)


def test_an_explainer_gives_one_map_for_each_concept(vlm, birds):
    for shape in ((32, 3, 4, 4), (8, 5, 4, 4), (32, 5, 4)):
        with pytest.raises(ValueError, match=r"maps of shape \(.* expected \[B, K, h, w\] with B, K = \(32, 5\)"):
            evaluate(vlm, birds, BANK, explainer=lambda *_: torch.rand(shape), masks=False)  # noqa: B023


def test_a_category_without_concepts_is_named(vlm, birds):
    with warnings.catch_warnings(), pytest.raises(ValueError, match="the bank has no concepts for 'fendal'"):
        warnings.simplefilter("error")
        evaluate(vlm, birds, {**BANK, "fendal": []})


def test_a_part_may_have_a_slash_in_its_name(vlm, birds):
    slashed = without_attributes(birds, "categories")
    slashed.parts = ["crown / head", *birds.parts[1:]]
    tables = [part_table(image_table(vlm, data, BANK, insertion_images=0)) for data in (slashed, birds)]
    assert list(tables[0].columns) == slashed.parts and np.allclose(*tables)
