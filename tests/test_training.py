"""Fine-tuning: the loop against one written by hand, and what it says when it stops."""
from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_birds import BANK, Recorder, bank_without, bird_vlm, same, weights

from dealkit import ConceptBank, DealConfig, finetune
from dealkit.datasets import Birdworld

DEAL = DealConfig(lambda_disentangle=.7, gamma_localize=.1, overlap="cosine", aggregate="max", guard=.4, lr=1e-3,
                  batch_size=8)
REGULARISERS = ("disentangle", "localize", "guard")


def run(config=DEAL, vlm=None, n=24, **options):
    """Fine-tune a fresh tiny model on a few birds -> (model, history)."""
    vlm = vlm or bird_vlm()
    return vlm, finetune(vlm, options.pop("data", None) or Birdworld(n=n), options.pop("bank", BANK), config,
                         progress=False, **options)


def test_detached_maps_train_exactly_like_contrastive_only_and_deal_does_not():
    """The released code's regularisers carry no gradient: bit for bit, they do nothing."""
    control, table = run(DEAL.contrastive_only, n=32)
    detached, _ = run(replace(DEAL, detach_maps=True), n=32)
    deal, other = run(DEAL, n=32)
    assert len(table) == 4
    assert same(weights(control), weights(detached))
    assert not same(weights(control), weights(deal))
    # the first step starts from the same weights, sees the same images and captions: the runs are paired
    assert table.contrastive[0] == other.contrastive[0] and table.contrastive[3] != other.contrastive[3]


@pytest.mark.parametrize("method", ["relevance", "gradeclip", "legrad", "every_exit"])
def test_deal_lowers_the_overlap_that_contrastive_only_leaves(method):
    config = replace(DEAL, guard=0., gamma_localize=0., epochs=5, method=method)
    _, deal = run(config, n=16)
    _, control = run(config.contrastive_only, n=16)
    assert deal.disentangle.iloc[-2:].mean() < .9 * control.disentangle.iloc[-2:].mean()


def test_a_step_costs_one_pass_through_each_trunk():
    vlm = bird_vlm()
    passes = {"image": 0, "text": 0}

    def count(name):
        def hook(*_):
            passes[name] += 1
        return hook

    hooks = [vlm.model.visual.conv1.register_forward_hook(count("image")),
             vlm.model.visual.transformer.resblocks[0].register_forward_hook(count("image")),
             vlm.model.transformer.register_forward_hook(count("text"))]
    run(vlm=vlm, n=24)
    for hook in hooks:
        hook.remove()
    assert passes == {"image": 2 * 3, "text": 3}


# ------------------------------------------------------------------------------------------------------------ the loop


def test_the_history_is_tidy():
    _, table = run(replace(DEAL, epochs=2), n=20)                        # 8 + 8 + 4 images an epoch
    assert list(table.columns) == ["step", "epoch", "contrastive", *REGULARISERS, "total", "dead_maps"]
    assert table.step.tolist() == list(range(6)) and table.epoch.tolist() == [0, 0, 0, 1, 1, 1]
    weighted = sum(w * table[name] for name, w in zip(
        REGULARISERS, (DEAL.lambda_disentangle, DEAL.gamma_localize, DEAL.guard)))
    assert np.allclose(table.total, table.contrastive + weighted, rtol=1e-5)


def test_every_epoch_shows_every_image_once_in_another_order():
    data = Recorder(Birdworld(n=20))
    run(replace(DEAL, epochs=3), data=data)
    other = Recorder(Birdworld(n=20))
    run(replace(DEAL, epochs=3, seed=1), data=other)
    assert data.fetched[0] != other.fetched[0]
    epochs = [sum(data.fetched[i:i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others():
    one, table = run()
    other = bird_vlm()
    torch.manual_seed(123)                                               # the caller's random state plays no part
    _, again = run(vlm=other)
    third, changed = run(replace(DEAL, seed=1))
    assert table.equals(again) and same(weights(one), weights(other))
    assert not table.equals(changed) and not same(weights(one), weights(third))


def test_contrastive_only_equals_a_loop_written_by_hand():
    """Oracle: stock open_clip encoders with full padding, InfoNCE spelled out, torch's Adam; in float64."""
    config = replace(DEAL.contrastive_only, concept_captions=0., epochs=2, weight_decay=.01)
    data = Recorder(Birdworld(n=20))
    vlm, table = run(config, vlm=bird_vlm(dtype=torch.float64), data=data)

    mine = bird_vlm(dtype=torch.float64)
    model, birds, losses = mine.model, Birdworld(n=20), []
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=(.9, .98), eps=1e-6, weight_decay=.01)
    for indices in data.fetched:
        batch = birds.batch(indices)
        texts = [f"a photo of a {Birdworld.categories[y]}" for y in batch["label"]]
        image_emb = F.normalize(model.encode_image(batch["image"].double()), dim=-1)
        text_emb = F.normalize(model.encode_text(mine.tokenizer(texts)), dim=-1)
        logits = model.logit_scale.exp() * image_emb @ text_emb.T
        loss = 0.
        for i, own in enumerate(batch["label"]):
            rivals = [j for j, other in enumerate(batch["label"]) if j == i or other != own]
            both = torch.logsumexp(logits[i, rivals], 0) + torch.logsumexp(logits[rivals, i], 0)
            loss = loss - logits[i, i] + both / 2
        loss = loss / len(indices)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.allclose(table.contrastive, losses, rtol=1e-9)
    for (name, theirs), ours in zip(model.state_dict().items(), vlm.model.state_dict().values()):
        assert torch.allclose(theirs, ours, rtol=1e-6, atol=1e-8), name


def test_the_temperature_stays_within_clips_bound():
    vlm = bird_vlm()
    with torch.no_grad():
        vlm.model.logit_scale.fill_(5.)                                  # a factor of 148
    run(vlm=vlm, n=8)
    assert vlm.model.logit_scale.item() == pytest.approx(math.log(100))


@pytest.mark.parametrize("fails", [False, True])
def test_a_frozen_text_tower_stays_as_it_is_and_flags_come_back(fails):
    vlm = bird_vlm()
    vlm.model.visual.conv1.weight.requires_grad_(False)                  # frozen by the user, who wants it to stay so
    before = weights(vlm)
    flags = {name: p.requires_grad for name, p in vlm.model.named_parameters()}
    config = replace(DEAL, freeze_text=True)
    if fails:
        with pytest.raises(RuntimeError, match="power"):
            run(config, vlm=vlm, data=Recorder(Birdworld(n=24), fails_at=2))
    else:
        run(config, vlm=vlm)
    after = weights(vlm)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(("visual.", "logit_scale")) for name in changed)
    assert "visual.conv1.weight" not in changed and "visual.transformer.resblocks.0.ln_1.weight" in changed
    assert flags == {name: p.requires_grad for name, p in vlm.model.named_parameters()}
    assert all(p.grad is None for p in vlm.model.parameters())


# ----------------------------------------------------------------------------------------------------------- bad input


def test_a_category_that_the_bank_does_not_have_stops_before_any_work(tmp_path):
    with pytest.raises(KeyError, match="ruvane"):
        run(bank=bank_without("ruvane"), out_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_bank_with_a_single_concept_is_an_error_that_names_the_category():
    poor = ConceptBank("birds", {**dict(BANK.items()), "fendal": ["red tail"]})
    with pytest.raises(ValueError, match="fendal.*two"):
        run(bank=poor)


def test_images_of_no_category_are_an_error():
    vlm = bird_vlm()
    with pytest.raises(ValueError, match="no category"):
        run(vlm=vlm, data=Birdworld(n=16, random_birds=1.))
    assert same(weights(vlm), weights(bird_vlm()))


def test_a_broken_image_stops_the_run_before_the_weights_move():
    vlm = bird_vlm()

    def spoil(item):
        item["image"][0, 3, 3] = float("nan")
        return item

    with pytest.raises((ValueError, FloatingPointError), match="NaN"):
        run(vlm=vlm, data=Recorder(Birdworld(n=16), spoil=spoil))
    assert same(weights(vlm), weights(bird_vlm()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_term_that_is_not_finite_stops_with_step_and_term(value):
    vlm = bird_vlm()
    with torch.no_grad():
        vlm.model.visual.proj[0, 0] = value
    before = weights(vlm)
    with pytest.raises(FloatingPointError, match=r"step 0: the term 'contrastive' is nan.*lr"):
        run(vlm=vlm)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before.values(), weights(vlm).values()))


def test_a_regulariser_that_is_not_finite_is_named(monkeypatch):
    monkeypatch.setattr("dealkit.training.objective.localize_loss", lambda *_: torch.tensor(float("inf")))
    vlm = bird_vlm()
    with pytest.raises(FloatingPointError, match="step 0: the term 'localize' is inf"):
        run(vlm=vlm)
    assert same(weights(vlm), weights(bird_vlm()))


def test_a_gradient_that_is_not_finite_never_reaches_the_weights():
    """A finite loss may have a gradient that is not; after the last step nothing else would notice."""
    vlm, calls = bird_vlm(), []

    def overflow(gradient):
        calls.append(1)
        return gradient * (float("inf") if len(calls) == 3 else 1.)

    vlm.model.visual.proj.register_hook(overflow)
    with pytest.raises(FloatingPointError, match="step 2: the gradient of 'visual.proj'"):
        run(vlm=vlm, n=24)
    assert all(value.isfinite().all() for value in weights(vlm).values())
    assert not same(weights(vlm), weights(bird_vlm()))                   # steps 0 and 1 were taken


class Nothing(torch.utils.data.Dataset):
    categories = ["zorvit"]

    def __len__(self):
        return 0


def test_an_empty_training_set_is_an_error():
    with pytest.raises(ValueError, match="training set is empty"):
        finetune(bird_vlm(), Nothing(), BANK, DEAL, progress=False)


def test_an_unknown_method_stops_before_any_step(tmp_path):
    with pytest.raises(ValueError, match="unknown method 'foo'"):
        finetune(bird_vlm(), Birdworld(n=8), BANK, replace(DEAL, method="foo"), progress=False)
