"""What the methods of `explain` refuse, in one sentence each."""

from __future__ import annotations

import pytest
from conftest import METHODS, random_images, tiny_resnet, tiny_vit

from dealkit.maps import VARIABLES, explain

every_method = pytest.mark.parametrize("build, method", METHODS)

@every_method
def test_a_concept_of_300_words(build, method):
    vlm = build()
    with pytest.raises(ValueError, match="longer than the model's context of 8 tokens.*Shorten it") as error:
        explain(vlm, random_images(vlm), ["red head", "red " * 300], method=method)
    assert len(str(error.value)) < 300


def test_a_concept_of_300_words_for_clips_tokenizer(vit):
    with pytest.raises(ValueError, match="longer than the model's context of 77 tokens.*'feathers feathers"):
        explain(vit, random_images(vit, 1), ["feathers " * 300])


@pytest.mark.parametrize("method", ["relevance", "gradeclip", "legrad", "every_exit"])
def test_a_method_that_a_tower_has_no_variable_for(method):
    vlm = tiny_resnet()
    with pytest.raises(ValueError, match=f"^'{method}' does not apply to this tower, ModifiedResNet; it has gradcam.$"):
        explain(vlm, random_images(vlm), ["red"], method=method)
    with pytest.raises(ValueError, match=f"no variable of kind '{VARIABLES[method]}'.*features"):
        vlm.tower.split(random_images(vlm), kind=VARIABLES[method])


def test_an_unknown_method_brings_those_that_there_are():
    vlm = tiny_vit()
    with pytest.raises(ValueError, match="^unknown method 'magic'; this tower, CLS-pooled ViT, has relevance, gradcam, "
                                         "gradeclip, legrad, every_exit.$"):
        explain(vlm, random_images(vlm), ["red"], method="magic")


@pytest.mark.parametrize("kind", ["context", "exits"])
def test_bad_cuts(kind):
    vlm = tiny_vit()
    assert vlm.tower.split(random_images(vlm), block=2, kind=kind).kind == kind  # the last of three, counted from 0
    with pytest.raises(ValueError, match="block 0 is not the last one"):
        vlm.tower.split(random_images(vlm), block=0, kind=kind)
    with pytest.raises(ValueError, match="block 3 does not exist"):
        vlm.tower.split(random_images(vlm), block=3, kind=kind)


@pytest.mark.parametrize("method", ["gradeclip", "legrad", "every_exit"])
def test_dropped_patches_are_refused(method):
    vlm = tiny_vit(patch_dropout=0.5)
    vlm.model.train()
    with pytest.raises(ValueError, match=r"vlm.model.eval\(\)"):
        explain(vlm, random_images(vlm), ["red"], method=method)
