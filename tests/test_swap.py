"""The swap of surroundings: what is kept and what is exchanged, by hand; and that a run with it can be made again."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_birds import BANK, bird_resnet, bird_vlm, same, weights

from dealkit import DealConfig, finetune, load_model
from dealkit.blind import BLIND
from dealkit.datasets import Birdworld
from dealkit.maps import explain
from dealkit.training import DealObjective, swap
from dealkit.training.swap import DONORS, exchange, kept_places, swap_surroundings

CONFIG = DealConfig.recommended(lr=1e-3, batch_size=8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def birds_and_concepts(vlm, n=8):
    """A batch of n birds, and the embeddings of their own concepts `[n, 5, D]`."""
    batch = Birdworld(n=n, size=vlm.image_size[0]).batch(range(n))
    with torch.no_grad():
        return batch, torch.stack([vlm.encode_text(BANK[Birdworld.categories[y]]) for y in batch["label"]])


def signed_images(count, size):
    """Images in which every pixel says whose it is, and where: `count` of `[3, size, size]`."""
    place = torch.arange(size * size).view(size, size).float()
    return torch.stack([torch.stack([torch.full((size, size), float(i)), place, -place]) for i in range(count)])


# ----------------------------------------------------------------------------------------------------- what is kept


def test_kept_places_by_hand():
    one = torch.tensor([[0.0, 8.0, 4.0], [0.0, 0.0, 2.0]])               # normalised: 0 1 .5 / 0 0 .25
    other = torch.tensor([[0.1, 0.0, 0.0], [0.0, 0.06, 0.0]])            # normalised: 1 0 0 / 0 .6 0, however faint
    dead = torch.full((2, 3), 9.0)                                       # says nothing
    maps = torch.stack([torch.stack([one, other]), torch.stack([one, dead])])
    kept = kept_places(maps, 0.5)                                        # 3 of 6
    assert kept.tolist() == [[[True, True, False], [False, True, False]], [[False, True, True], [False, False, True]]]
    assert kept_places(maps, 4 / 6)[0].tolist() == [[True, True, True], [False, True, False]]
    assert kept_places(maps, 1.0).all()
    for keep in (0.0, 0.01, 1 / 6):                                      # at least one
        assert kept_places(maps, keep).sum(dim=(1, 2)).tolist() == [1, 1]
    assert kept_places(maps, 0.4).sum(dim=(1, 2)).tolist() == [2, 2]     # 2.4 of 6


# ------------------------------------------------------------------------------------------------ what is exchanged


@pytest.mark.parametrize("seed", range(4))
def test_what_is_exchanged_comes_from_the_same_place_of_another_image_that_does_not_keep_it(seed):
    images, kept = signed_images(6, 8), torch.rand(6, 4, 4, generator=seeded(seed + 10)) < 0.3
    before = images.clone()
    mixed = exchange(images, kept, seeded(seed))
    assert torch.equal(images, before)
    assert torch.equal(mixed[:, 1:], images[:, 1:])                      # every pixel from its own place
    fine = kept.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    source = mixed[:, 0].long()
    owner = torch.arange(6).view(6, 1, 1).expand_as(source)
    assert torch.equal(source[fine], owner[fine])                        # what is kept stays
    moved = source != owner
    assert not fine.gather(0, source)[moved].any(), "a donor's kept places are not given away"
    draws, expected = seeded(seed), owner.clone()
    donors = [torch.randperm(6, generator=draws).tolist() for _ in range(DONORS)]
    for i, y, x in (~fine).nonzero().tolist():
        others = [order[i] for order in donors if order[i] != i and not fine[order[i], y, x]]
        expected[i, y, x] = others[0] if others else i                   # the first that can give it; else it stays
    assert torch.equal(source, expected)
    assert len(source.unique()) == 6
    assert torch.equal(exchange(images, kept, seeded(seed)), mixed)
    assert not torch.equal(exchange(images, kept, seeded(seed + 1)), mixed)


def test_an_image_that_draws_itself_asks_the_next_donor():
    """Two images, nothing kept: each becomes the other, unless all three draws leave them in their places, 1 in 8."""
    images, kept = signed_images(2, 4), torch.zeros(2, 2, 2, dtype=torch.bool)
    mixed = [exchange(images, kept, seeded(seed))[:, 0] for seed in range(64)]
    swapped = [torch.equal(first, images[:, 0].flip(0)) for first in mixed]
    assert all(ok or torch.equal(first, images[:, 0]) for ok, first in zip(swapped, mixed))
    assert 0.78 < np.mean(swapped) < 0.97


def test_with_everything_kept_nothing_moves():
    images = signed_images(4, 6)
    assert torch.equal(exchange(images, torch.ones(4, 3, 3, dtype=torch.bool), seeded()), images)
    one = images[:1]
    assert torch.equal(exchange(one, torch.zeros(1, 3, 3, dtype=torch.bool), seeded()), one)     # nobody to ask


# ------------------------------------------------------------------------------------------------------ the whole swap


def changed_images(before, after) -> list[bool]:
    return [not torch.equal(one, other) for one, other in zip(before, after)]


def test_the_share_is_the_chance_of_each_image():
    vlm = bird_vlm()
    batch, emb = birds_and_concepts(vlm, 64)
    images = batch["image"]
    assert torch.equal(swap_surroundings(vlm, images, emb, 0.0, generator=seeded()), images)
    assert sum(changed_images(images, swap_surroundings(vlm, images, emb, 1.0, generator=seeded()))) >= 63
    half = swap_surroundings(vlm, images, emb, 0.5, generator=seeded())
    assert 20 < sum(changed_images(images, half)) < 44
    assert torch.equal(swap_surroundings(vlm, images, emb, 0.5, generator=seeded()), half)
    assert not torch.equal(swap_surroundings(vlm, images, emb, 0.5, generator=seeded(1)), half)
    torch.manual_seed(3)
    drawn = swap_surroundings(vlm, images, emb, 0.5)                     # without a generator: torch's own
    torch.manual_seed(3)
    assert torch.equal(swap_surroundings(vlm, images, emb, 0.5), drawn)


@pytest.mark.parametrize("build, method, means", [
    (bird_vlm, None, "every_exit"), (bird_vlm, "relevance", "relevance"), (bird_resnet, None, "gradcam"),
    (bird_vlm, "centre", "centre"), (bird_vlm, "random", "random"), (bird_resnet, "uniform", "uniform")])
def test_the_maps_of_the_method_decide(build, method, means):
    vlm = build()
    batch, emb = birds_and_concepts(vlm)
    maps = BLIND[means](vlm, batch["image"], emb) if means in BLIND else explain(vlm, batch["image"], emb, means)
    expected = exchange(batch["image"], kept_places(maps, 0.4), seeded())
    before = weights(vlm)
    found = swap_surroundings(vlm, batch["image"], emb, 1.0, 0.4, method, seeded())
    assert torch.equal(found, expected) and not torch.equal(found, batch["image"])
    assert not found.requires_grad and same(weights(vlm), before) and not vlm.model.training
    assert all(p.grad is None and p.requires_grad for p in vlm.model.parameters())


def test_an_unknown_method_brings_those_that_there_are():
    vlm = bird_vlm()
    batch, emb = birds_and_concepts(vlm, 2)
    with pytest.raises(ValueError, match="unknown method 'center'; this tower, CLS-pooled ViT, has relevance, .*exit"):
        swap_surroundings(vlm, batch["image"], emb, 1.0, method="center")


@pytest.mark.parametrize("build", [bird_vlm, bird_resnet])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_keeps_nearly_the_same_places(build, precision):
    vlm = build()
    batch, emb = birds_and_concepts(vlm, 16)
    full, half = (swap_surroundings(vlm, batch["image"], emb, 1.0, 0.4, None, seeded(), name)
                  for name in ("float32", precision))
    assert half.dtype == torch.float32 and half.isfinite().all()
    assert (half == full).float().mean() > 0.9


def shares(vlm, n, method):
    """Mean share of what surrounds a bird that is exchanged, and of its parts that stays."""
    batch, emb = birds_and_concepts(vlm, n)
    mixed = swap_surroundings(vlm, batch["image"], emb, 1.0, 0.3, method, seeded())
    moved, bird = (mixed != batch["image"]).any(dim=1).flatten(1), batch["part_masks"].any(dim=1).flatten(1)
    return [float(((wanted & area).sum(1) / area.sum(1)).mean()) for wanted, area in ((moved, ~bird), (~moved, bird))]


def test_a_trained_model_keeps_its_birds_and_loses_their_surroundings():
    """Without masks; 30 % of the places are kept, and so chance is that much."""
    vlm = load_model("birdworld-vit", device="cpu")
    surroundings, parts = shares(vlm, 64, None)
    assert surroundings > 0.7 and parts > 0.8
    assert shares(vlm, 64, "random")[1] < 0.45


def test_a_trained_resnet_does_so_too():
    vlm = load_model("birdworld-rn", device="cpu")
    surroundings, parts = shares(vlm, 32, None)
    assert surroundings > 0.65 and parts > 0.65 > 0.5 > shares(vlm, 32, "random")[1]


# ------------------------------------------------------------------------------------------------------- in training


def seen_by(monkeypatch):
    """What goes into the swap and what comes out, step by step."""
    seen, whole = [], swap.swap_surroundings

    def noted(vlm, images, *args):
        seen.append((images, args, whole(vlm, images, *args)))
        return seen[-1][-1]
    monkeypatch.setattr("dealkit.training.objective.swap_surroundings", noted)
    return seen


@pytest.mark.parametrize("changes", [
    {}, {"swap_method": "centre"}, {"precision": "bfloat16"}, {"precision": "float16"}, {"freeze_text": True},
    {"checkpoint_activations": True}, {"method": "legrad", "n_concepts": 3}], ids=str)
def test_two_runs_with_a_swap_are_one(changes, monkeypatch):
    config, results, seen = replace(CONFIG, **changes), [], seen_by(monkeypatch)
    for config in (config, config, replace(config, swap=0.)):
        vlm = bird_vlm()
        before = [getattr(part, "grad_checkpointing", None) for part in vlm.model.modules()]
        table = finetune(vlm, Birdworld(n=24), BANK, config, progress=False)
        assert before == [getattr(part, "grad_checkpointing", None) for part in vlm.model.modules()]
        results.append((table, weights(vlm)))
    (table, one), (again, other), (_, without) = results
    assert table.equals(again) and same(one, other) and not same(one, without)
    assert len(seen) == 6 and all(torch.equal(a[-1], b[-1]) for a, b in zip(seen[:3], seen[3:]))
    moved = [sum(changed_images(images, mixed)) for images, _, mixed in seen[:3]]
    assert 3 <= sum(moved) < 24                                          # about half of them
    assert seen[0][1][0].shape == (8, config.n_concepts or 5, 24)
    assert seen[0][1][1:4] == (0.5, 0.3, config.swap_method)


def test_recomputing_swaps_the_same_images(monkeypatch):
    seen = seen_by(monkeypatch)
    for recompute in (False, True):
        finetune(bird_vlm(), Birdworld(n=8), BANK, replace(CONFIG, checkpoint_activations=recompute), progress=False)
    assert torch.equal(seen[0][-1], seen[1][-1]) and not torch.equal(seen[0][0], seen[0][-1])


def test_a_run_without_swap_asks_for_no_maps_of_it(monkeypatch):
    seen = seen_by(monkeypatch)
    finetune(bird_vlm(), Birdworld(n=16), BANK, replace(CONFIG, swap=0.), progress=False)
    assert not seen


def test_texts_of_a_frozen_tower_are_encoded_once_for_the_swap_too():
    """The bank's texts: in a second step with the same categories and captions the text tower does nothing."""
    vlm, calls = bird_vlm(), []
    objective = DealObjective(vlm, BANK, replace(CONFIG, freeze_text=True, swap=1.))
    vlm.model.transformer.register_forward_hook(lambda *_: calls.append(1))
    batch = Birdworld(n=6).batch(range(6))
    categories = [Birdworld.categories[y] for y in batch["label"]]
    one = objective.swapped(batch["image"], categories, [0, 0, 0, 1])
    assert len(calls) == len(set(categories))
    again = objective.swapped(batch["image"], categories, [0, 0, 0, 1])
    assert len(calls) == len(set(categories)) and torch.equal(one, again)
    objective(batch["image"], categories, [f"a photo of a {c}" for c in categories])
    assert len(calls) == len(set(categories))


def test_each_step_and_each_process_draws_its_own_donors():
    objective = DealObjective(bird_vlm(), BANK, replace(CONFIG, swap=1.))
    batch = Birdworld(n=8).batch(range(8))
    categories = [Birdworld.categories[y] for y in batch["label"]]
    one, step, rank, seed = (objective.swapped(batch["image"], categories, key) for key in (
        [0, 3, 0, 1], [0, 4, 0, 1], [0, 3, 1, 1], [1, 3, 0, 1]))
    assert torch.equal(objective.swapped(batch["image"], categories, [0, 3, 0, 1]), one)
    assert not any(torch.equal(one, other) for other in (step, rank, seed))
