"""What evaluation costs, and that neither the precision of a model nor the form of the embeddings stands in its way."""
from __future__ import annotations

import pandas as pd
import pytest
import torch
from tiny_birds import BANK, bird_vlm

from dealkit import explain
from dealkit.evaluation import centre_maps, image_table, random_maps, uniform_maps


def test_it_costs_what_the_docstring_says(birds):
    vlm, encoded, explained = bird_vlm(), [], []
    encode = vlm.encode_image
    vlm.encode_image = lambda images: (encoded.append(len(images)), encode(images))[1]

    def explainer(vlm, images, emb):
        explained.append(len(images))
        return explain(vlm, images, emb)

    for options, passes, explanations in (({"insertion_images": 0}, 0, 0),
                                          ({"insertion_images": 3, "perturbed_images": 0}, 40 * 5 + 8, 0),
                                          ({"insertion_images": 0, "perturbed_images": 3}, 17, 9)):
        encoded.clear(), explained.clear()
        image_table(vlm, birds, BANK, explainer=explainer, **options)
        assert sum(encoded) == 32 + 3 * passes and sum(explained) == 32 + 3 * explanations
    half = image_table(vlm, birds, BANK, insertion_images=5)
    assert half["insertion_auc"].count() == 5 and half["infidelity"].count() == half["max_sensitivity"].count() == 2


@pytest.mark.parametrize("explainer", [random_maps, centre_maps, uniform_maps])
def test_maps_that_know_nothing_take_embeddings_as_explain_does(vlm, birds, explainer):
    images = birds.batch(range(4))["image"]
    own = explainer(vlm, images, torch.zeros(4, 5, 24))
    assert own.shape == (4, 5, 5, 5) and torch.equal(own, explainer(vlm, images, torch.zeros(5, 24)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_evaluated_too(vlm, birds, dtype):
    options = {"insertion_images": 3, "perturbed_images": 3}
    table, exact = (image_table(model, birds, BANK, **options) for model in (bird_vlm(dtype=dtype), vlm))
    assert table["label"].tolist() == exact["label"].tolist() == [bird["label"] for bird in birds]
    assert pd.api.types.is_integer_dtype(table["label"]) and pd.api.types.is_integer_dtype(table["group"])
    for name in ("overlap_cosine", "mass_in_mask", "insertion_auc", "max_sensitivity"):
        assert table[name].mean() == pytest.approx(exact[name].mean(), rel=.2), name
