"""What explain takes, and what it says about everything else."""

from __future__ import annotations

import pytest
import torch
from conftest import random_images, tiny_resnet, tiny_vit

from dealkit.maps import choose_method, explain

METHODS = [(tiny_vit, "relevance"), (tiny_vit, "gradcam"), (tiny_resnet, "gradcam")]


@pytest.mark.parametrize("build, method", METHODS)
def test_all_forms_of_texts_agree(build, method):
    vlm = build()
    images, texts = random_images(vlm), ["red head", "blue wing", "belly"]
    expected = explain(vlm, images, texts, method=method)
    emb = vlm.encode_text(texts).detach()
    for form in (tuple(texts), [texts, texts], emb, 7.5 * emb, emb.expand(2, -1, -1), emb.float()):
        maps = explain(vlm, images, form, method=method)
        torch.testing.assert_close(maps, expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("build, method", METHODS)
def test_each_image_may_have_its_own_texts(build, method):
    vlm = build()
    images, rows = random_images(vlm, 3), [["red head", "blue wing"], ["blue wing", "belly"], ["bird", "bird"]]
    maps = explain(vlm, images, rows, method=method)
    for image, row, own in zip(images, rows, maps):
        torch.testing.assert_close(explain(vlm, image[None], row, method=method)[0], own)


@pytest.mark.parametrize("error, says, texts", [
    (TypeError, r"put it in a list: \['red head'\]", "red head"),
    (TypeError, "expected a list of str", {"red head"}),
    (ValueError, "K = 0", []),
    (ValueError, r"texts\[1\] is empty", ["red", " "]),
    (TypeError, r"texts\[0\] is a int", [3]),
    (ValueError, "longer than the model's context of 8", ["red red red red red red red"]),
    (ValueError, "3 lists for 2 images", [["red"], ["red"], ["red"]]),
    (ValueError, "same number", [["red"], ["red", "blue"]]),
    (ValueError, "at least one", [[], []]),
    (TypeError, "all str or all lists", [["red"], "blue"]),
    (ValueError, r"expected \[K, D\] or", torch.ones(24)),
    (ValueError, "for 3 images, but there are 2", torch.ones(3, 2, 24)),
    (ValueError, "K = 0", torch.ones(0, 24)),
    (TypeError, "Tokens are no embeddings", torch.ones(2, 24, dtype=torch.long)),
    (ValueError, "NaN", torch.full((2, 24), torch.nan)),
    (ValueError, "embed texts in 5 dimensions.*24", torch.ones(2, 5)),
])
def test_bad_texts(error, says, texts):
    vlm = tiny_vit()
    with pytest.raises(error, match=says):
        explain(vlm, random_images(vlm), texts)


def test_bad_methods():
    vlm, resnet = tiny_vit(), tiny_resnet()
    with pytest.raises(ValueError, match="unknown method 'magic'.*relevance, gradcam"):
        explain(vlm, random_images(vlm), ["red"], method="magic")
    with pytest.raises(ValueError, match="'relevance' does not apply to a ModifiedResNet"):
        explain(resnet, random_images(resnet), ["red"], method="relevance")
    assert choose_method(vlm.tower) == "relevance" and choose_method(resnet.tower) == "gradcam"


@pytest.mark.parametrize("error, says, spoil", [
    (ValueError, r"images\[None\]", lambda x: x[0]),
    (ValueError, "empty batch", lambda x: x[:0]),
    (ValueError, "expected", lambda x: x[..., 1:]),
    (TypeError, "floating point", lambda x: x.to(torch.uint8)),
    (ValueError, "NaN", lambda x: x.masked_fill(x > 1, torch.nan)),
])
def test_bad_images(error, says, spoil):
    vlm = tiny_vit()
    with pytest.raises(error, match=says):
        explain(vlm, spoil(random_images(vlm)), ["red"])
