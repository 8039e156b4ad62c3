"""open_clip's own configurations: the smallest of each family always, all of them with -m all_towers.

Only image towers are built, with random weights, so nothing is fetched from a hub. What is checked, and how such a
tower is woken up, is in tower_check.py; tiny towers of every kind are held against oracles in test_tower_methods.py.
"""

from __future__ import annotations

import gc

import pandas as pd
import psutil
import pytest
import torch
from tiny_towers import TOWERS
from tower_check import measure, problems, sample, wake
from tower_table import LIGHT, LIMIT, PATH, check, count_parameters, fingerprint

import dealkit
from dealkit.models import load_model, timm_towers
from dealkit.models.pooled import open_latent

TABLE = pd.read_csv(PATH).set_index("config")
SMALLEST = TABLE.groupby("family")["parameters_m"].idxmin().tolist()
# configurations with the same image tower are walked once, under the first of their names
DISTINCT = list({fingerprint(name): name for name in reversed(TABLE.sort_values("parameters_m").index)}
                .values())[::-1]
SHORT = 2e8  # parameters; a ViT above is checked with its first and last blocks only, unless all are walked
OVERHEAD = 1.7  # memory of a walk, in multiples of the weights


@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_tower_of_each_family(name):
    result = check(name, short=count_parameters(name) > SHORT, every_gradient=False)
    assert problems(result) == []
    assert result["difference"] < 1e-5


@pytest.mark.all_towers
@pytest.mark.parametrize("name", DISTINCT)
def test_every_tower(name):
    count, free = count_parameters(name), psutil.virtual_memory().available
    needed = 4 * OVERHEAD * count + 1e9
    if count < LIMIT and free < needed:
        pytest.skip(f"{name}, {count / 1e6:.0f} M parameters, needs {needed / 1e9:.0f} GB; {free / 1e9:.0f} are free")
    assert problems(check(name, short=count > LIMIT, every_gradient=count < LIGHT)) == []
    gc.collect()


def test_a_tower_that_does_nothing_is_a_problem():
    """As timm builds it, EVA's last projection is so small that any two embeddings agree: the check must not pass."""
    torch.manual_seed(0)
    asleep = TOWERS["CLS-pooled timm ViT"]["EVA"]().eval()
    assert "the stock embedding is too small for a comparison" in problems(measure(asleep))


def test_a_cut_that_is_wrong_is_a_problem(monkeypatch):
    """The same check of a tower whose cut forgets a bias, of one whose maps are constants, and of one that is right."""
    visual = TOWERS["attention-pooled timm ViT"]["SigLIP"]().eval()
    wake(visual, None)
    assert problems(measure(visual)) == []
    with monkeypatch.context() as patch:
        patch.setattr(timm_towers, "open_latent", lambda pool, tokens, finish: open_latent(
            pool, tokens, lambda x: finish(x - pool.proj.bias)))
        assert problems(measure(visual)) == [
            "the embedding through a cut differs from the stock tower's"]
    stock = visual.trunk.patch_embed.forward
    monkeypatch.setattr(visual.trunk.patch_embed, "forward", lambda images: stock(images).detach())
    monkeypatch.setattr(visual.trunk.blocks[0], "forward", lambda x: x.detach())
    assert "a loss on the maps does not reach the first block" in problems(measure(visual))


def test_a_timm_model_of_open_clip_from_its_name_to_its_maps():
    """With its text tower and its words; what the others leave out."""
    torch.manual_seed(0)
    vlm = load_model("MobileCLIP2-S0", pretrained=None, device="cpu")
    wake(vlm.model.visual, sample(vlm.model.visual, count=4))
    images = sample(vlm.model.visual)
    maps = dealkit.explain(vlm, images, ["a red head", "a blue wing"])
    assert maps.shape == (2, 2, 8, 8) and vlm.grid == (8, 8) and maps.amax(dim=(2, 3)).min() > 0
    torch.testing.assert_close(maps, dealkit.explain(vlm, images, vlm.encode_text(["a red head", "a blue wing"])))
    with pytest.raises(ValueError, match="this model has 512"):
        dealkit.explain(vlm, images, torch.randn(2, 100))
