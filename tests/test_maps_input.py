"""What explain takes, and what it says about everything else."""

from __future__ import annotations

import pytest
import torch
from conftest import METHODS, random_images, tiny_resnet, tiny_vit

from dealkit.maps import choose_method, explain

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


def test_the_gradient_of_shared_texts_is_the_same_on_every_run_with_several_threads():
    """Where many images share a text, their gradients must be added up in a fixed order."""
    vlm, threads = tiny_vit(torch.float32), torch.get_num_threads()
    images = random_images(vlm, 320)
    rows = [["red", "blue", "head", "wing", "belly", "bird", ("a", "with")[i % 2]] for i in range(320)]
    torch.set_num_threads(4)
    try:
        seen = set()
        for _ in range(4):
            vlm.model.zero_grad()
            explain(vlm, images, rows, create_graph=True).square().sum().backward()
            seen.add(vlm.model.token_embedding.weight.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1


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


def test_the_default_method_is_the_papers():
    assert choose_method(tiny_vit().tower) == "relevance" and choose_method(tiny_resnet().tower) == "gradcam"


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
