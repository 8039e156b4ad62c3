"""One trunk pass an image: what it saves, that it changes no number, and that it holds on a GPU and for big tables."""
from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_birds import BANK, bird_resnet, bird_vlm

from dealkit import evaluate, explain
from dealkit.controls import evaluate_wrong_concepts
from dealkit.datasets import Birdworld
from dealkit.evaluation import centre_maps, embed, image_table, random_maps
from dealkit.evaluation.embeddings import category_weights
from dealkit.evaluation.ranks import ranks
from dealkit.maps import contributions, to_maps


class Trunk:
    """Counts the images that enter an image tower."""

    def __init__(self, vlm):
        self.images = 0
        self.handle = vlm.model.visual.conv1.register_forward_hook(self.count)

    def count(self, module, inputs, output):
        self.images += len(output)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.handle.remove()


def custom(vlm, images, emb):
    """An explainer that nobody knows."""
    return explain(vlm, images, emb)


def by_split(vlm, images, emb, split):
    return to_maps(contributions(split, emb, vlm.grid))


def by_exits(vlm, images, emb, *, split=None):
    assert split.kind == "exits"
    return to_maps(contributions(split, emb, vlm.grid))


by_exits.kind = "exits"


@pytest.mark.parametrize("explainer, passes", [
    (None, 1), (explain, 1), (partial(explain, method="gradcam"), 1), (partial(explain, method="legrad"), 1),
    (partial(explain, method="every_exit"), 1),
    (partial(explain, method="gradeclip", signed=False), 1), (by_split, 1), (by_exits, 1), (random_maps, 1),
    (custom, 2), (partial(explain, create_graph=False), 2)])
def test_an_image_goes_through_the_trunk_once(vlm, birds, explainer, passes):
    with Trunk(vlm) as trunk:
        image_table(vlm, birds, BANK, explainer, insertion_images=0)
    assert trunk.images == 32 * passes


def same_table(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one, other[one.columns], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [bird_vlm, bird_resnet])
def test_it_changes_no_number(make):
    vlm = make()
    birds = Birdworld("test", n=32, size=vlm.image_size[0])
    alone = image_table(vlm, birds, BANK, custom, insertion_images=3, perturbed_images=2)
    for explainer in (None, by_split):
        same_table(image_table(vlm, birds, BANK, explainer, insertion_images=3, perturbed_images=2), alone)


@pytest.mark.parametrize("options", [{"method": "gradcam"}, {"method": "gradeclip"}, {"method": "legrad"},
                                     {"method": "every_exit"}, {"method": "gradcam", "signed": True}, {"signed": True}])
def test_a_method_through_a_partial_is_that_method(vlm, birds, options):
    other = lambda vlm, images, emb: explain(vlm, images, emb, **options)  # noqa: E731
    tables = [image_table(vlm, birds, BANK, e, insertion_images=0, perturbed_images=2, masks="signed" not in options)
              for e in (partial(explain, **options), other)]
    same_table(*tables)
    own = image_table(vlm, birds, BANK, insertion_images=0)
    assert not np.allclose(tables[0]["overlap_cosine"], own["overlap_cosine"])


def test_an_unknown_method_says_which_there_are(vlm, birds):
    with pytest.raises(ValueError, match="unknown method 'magic'; this tower"):
        evaluate(vlm, birds, BANK, explainer=partial(explain, method="magic"))


def test_an_explainer_with_a_split_gives_a_map_for_each_concept(vlm, birds):
    with pytest.raises(ValueError, match=r"maps of shape \(32, 4, 5, 5\); expected"):
        evaluate(vlm, birds, BANK, explainer=lambda vlm, images, emb, split: by_split(vlm, images, emb[:, 1:], split))


def test_embeddings_that_are_there_are_not_made_again(vlm, birds):
    emb = embed(vlm, birds)
    for explainer, passes in ((centre_maps, 0), (None, 1), (custom, 1)):
        own = image_table(vlm, birds, BANK, explainer, insertion_images=0, batch_size=12)
        with Trunk(vlm) as trunk:
            given = image_table(vlm, birds, BANK, explainer, insertion_images=0, batch_size=12, embeddings=emb)
        assert trunk.images == 32 * passes
        same_table(own, given)
    shuffled = image_table(vlm, birds, BANK, centre_maps, insertion_images=0, embeddings=emb.flip(0))
    assert not shuffled["caption_rank"].equals(own["caption_rank"])
    row = evaluate_wrong_concepts(vlm, birds, BANK, insertion_images=0, embeddings=emb)
    assert row["accuracy"] == own["correct"].mean()
    for bad in (emb[1:], emb[0]):
        with pytest.raises(ValueError, match=r"embeddings have shape .*; expected \[32, D\], one for each image"):
            evaluate(vlm, birds, BANK, embeddings=bad)
    with pytest.raises(ValueError, match="embeddings of images hold NaN"):
        evaluate(vlm, birds, BANK, explainer=centre_maps, insertion_images=0, embeddings=emb * torch.nan)


def test_processes_that_load_images_change_nothing(vlm, birds):
    same_table(image_table(vlm, birds, BANK, insertion_images=2, workers=2, batch_size=8),
               image_table(vlm, birds, BANK, insertion_images=2, batch_size=8))


def test_a_model_keeps_no_trace(birds):
    vlm = bird_vlm()
    for explainer in (None, by_split, by_exits):
        with torch.inference_mode():
            first = evaluate(vlm, birds, BANK, explainer=explainer, insertion_images=1)
        assert first.equals(evaluate(vlm, birds, BANK, explainer=explainer, insertion_images=1))
    assert all(p.grad is None and p.requires_grad for p in vlm.model.parameters())


# ------------------------------------------------------------------------------------------------------------ big data


def test_concepts_are_averaged_before_they_meet_the_images():
    """The mean of cosines is the cosine with the mean: no tensor of images x categories x concepts."""
    generator = torch.Generator().manual_seed(0)
    texts, images = torch.randn(7, 3, 5, generator=generator), torch.randn(4, 5, generator=generator)
    weights = category_weights(texts)
    assert weights.shape == (7, 5)
    expected = torch.cosine_similarity(images[:, None, None], texts[None], dim=-1).mean(2)
    torch.testing.assert_close(torch.nn.functional.normalize(images, dim=1) @ weights.T, expected)


def test_rankings_of_many_images_fit_into_memory(monkeypatch):
    """Both ways in portions of at most 64 MB; 50,000 images and 1,000 categories would be 200 MB at once."""
    n, c = 20_000, 1_000
    generator = torch.Generator().manual_seed(0)
    images, captions = torch.randn(n, 4, generator=generator), torch.randn(c, 4, generator=generator)
    largest, matmul = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (largest.append(len(a) * b.shape[1]), matmul(a, b))[1])
    places = ranks(images, captions, torch.arange(n) % c)
    assert max(largest) <= 16_000_000 and sum(largest) == 2 * n * c
    assert places["caption_rank"].min() >= 1 and places["caption_rank"].max() <= c
    assert 1 <= places["image_rank"].min() and places["image_rank"].max() <= n - n // c + 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make", [bird_vlm, bird_resnet])
def test_a_gpu_gives_the_same_row(make):
    vlm = make()
    birds = Birdworld("test", n=32, size=vlm.image_size[0])
    options = {"insertion_images": 3, "perturbed_images": 2, "batch_size": 10}
    for explainer in (None, custom, random_maps):
        here = evaluate(vlm.to("cpu"), birds, BANK, explainer=explainer, **options)
        there = evaluate(vlm.to("cuda"), birds, BANK, explainer=explainer, workers=2, **options)
        assert list(here.index) == list(there.index)
        np.testing.assert_allclose(there.to_numpy(float), here.to_numpy(float), rtol=.02, atol=.02)
    torch.testing.assert_close(embed(vlm, birds, workers=2), embed(vlm.to("cpu"), birds), rtol=1e-2, atol=1e-3)
