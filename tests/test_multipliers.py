"""Weights that look for a constraint: the update by hand, where it ends, and that a resumed run has it too."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tiny_birds import BANK, Recorder, bird_vlm, same, weights

from dealkit import DealConfig, finetune
from dealkit.datasets import Birdworld
from dealkit.training.multipliers import Multipliers

FIXED = DealConfig(lambda_disentangle=1., gamma_localize=.1, overlap="cosine", aggregate="max", guard=1., lr=1e-3,
                   batch_size=8, epochs=2)
LIMITED = replace(FIXED, limit_disentangle=.2, limit_localize=4., multiplier_rate=.5)
TERMS = ("disentangle", "localize")
WEIGHTS = ("lambda_disentangle", "gamma_localize")


def run(vlm, config, fails_at=None, n=24, **options):
    return finetune(vlm, Recorder(Birdworld(n=n), fails_at), BANK, config, progress=False, **options)


# ---------------------------------------------------------------------------------------------------------- the update


def test_the_update_by_hand():
    """lambda 1, limit 0.2: mu = 0.2. R = 0.5 is 1.5 limits too much: mu + 0.1 * 1.5 = 0.35, so lambda = 1.75."""
    multipliers = Multipliers(replace(FIXED, limit_disentangle=.2, multiplier_rate=.1))
    assert multipliers.columns == ("lambda_disentangle",)
    assert multipliers.weights == {"disentangle": 1., "localize": .1}
    multipliers.update({"disentangle": .5, "localize": 100.})
    assert multipliers.weights == {"disentangle": pytest.approx(1.75), "localize": .1}       # no limit: it stays
    assert multipliers.record() == {"lambda_disentangle": pytest.approx(1.75)}
    multipliers.update({"disentangle": .2, "localize": 0.})                                  # at the limit: it stays
    assert multipliers.weights["disentangle"] == pytest.approx(1.75)
    multipliers.update({"disentangle": 0., "localize": 0.})                                  # 0.35 - 0.1 = 0.25
    assert multipliers.weights["disentangle"] == pytest.approx(1.25)
    for _ in range(4):
        multipliers.update({"disentangle": 0., "localize": 0.})
    assert multipliers.weights["disentangle"] == 0.                                          # and not below


def test_one_rate_serves_terms_of_any_size():
    """Both terms twice their limits: both multipliers mu = weight * limit rise by the rate."""
    multipliers = Multipliers(LIMITED)
    multipliers.update({"disentangle": .4, "localize": 8.})
    assert multipliers.weights["disentangle"] * .2 == pytest.approx(1. * .2 + .5)
    assert multipliers.weights["localize"] * 4. == pytest.approx(.1 * 4. + .5)


def test_without_limits_nothing_moves():
    multipliers = Multipliers(FIXED)
    multipliers.update({"disentangle": 1e9, "localize": 0.})
    assert multipliers.columns == () and multipliers.record() == {}
    assert multipliers.weights == {"disentangle": 1., "localize": .1}


# ------------------------------------------------------------------------------------------------------------- the run


def test_the_history_has_the_weights_that_each_step_used():
    table = run(bird_vlm(), LIMITED)
    assert list(table.columns[-2:]) == list(WEIGHTS) and not set(WEIGHTS) & set(run(bird_vlm(), FIXED).columns)
    expected = Multipliers(LIMITED)
    for row in table.to_dict("records"):
        assert [row[name] for name in WEIGHTS] == [expected.weights[term] for term in TERMS]
        total = row["contrastive"] + LIMITED.guard * row["guard"] + sum(row[w] * row[t] for w, t in zip(WEIGHTS, TERMS))
        assert row["total"] == pytest.approx(total, rel=1e-5)
        expected.update(row)
    assert table["lambda_disentangle"].nunique() == len(table)
    one = run(bird_vlm(), replace(LIMITED, limit_localize=None))
    assert one.columns[-1] == "lambda_disentangle" and "gamma_localize" not in one


def test_a_limit_above_the_overlap_drives_lambda_to_zero_and_one_below_raises_it():
    config = replace(FIXED, lambda_disentangle=.2, epochs=4, multiplier_rate=.1)
    met = run(bird_vlm(), replace(config, limit_disentangle=2.))                   # a cosine is at most 1
    assert met.lambda_disentangle[0] == .2 and met.lambda_disentangle.iloc[-1] == 0.
    assert (np.diff(met.lambda_disentangle) <= 0).all() and met.disentangle.min() > .1
    missed = run(bird_vlm(), replace(config, limit_disentangle=.1))
    rises = np.diff(missed.lambda_disentangle) > 0
    assert (rises == (missed.disentangle.to_numpy()[:-1] > .1)).all() and rises[:3].all()
    assert missed.lambda_disentangle.max() > 1.
    assert missed.disentangle.iloc[-3:].mean() < .9 * met.disentangle.iloc[-3:].mean()


def test_a_weight_that_starts_at_zero_rises_where_there_is_a_limit():
    """The maps have their gradient from the first step on: a weight may come."""
    config = replace(FIXED.contrastive_only, limit_disentangle=.1, multiplier_rate=1.)
    one, other = bird_vlm(), bird_vlm()
    table = run(one, config)
    assert table.lambda_disentangle[0] == 0. and table.lambda_disentangle.iloc[-1] > 1.
    run(other, FIXED.contrastive_only)
    assert not same(weights(one), weights(other))


@pytest.mark.parametrize("config", [LIMITED, replace(LIMITED, swap=.5), replace(LIMITED, precision="float16"),
                                    replace(FIXED, swap=.5, freeze_text=True)],
                         ids=["limits", "limits and swap", "float16", "swap and frozen text"])
@pytest.mark.filterwarnings("ignore:the run in .* began with other weights")
def test_a_killed_run_goes_on_with_its_weights_bit_by_bit(tmp_path, config):
    whole, resumed = bird_vlm(), bird_vlm(seed=5)
    table = run(whole, config)
    with pytest.raises(RuntimeError, match="power"):
        run(bird_vlm(), config, fails_at=4, out_dir=tmp_path, save_every=3)
    assert run(resumed, config, out_dir=tmp_path, resume=True).equals(table)
    assert same(weights(resumed), weights(whole))
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "history.csv"), table, rtol=1e-12)


def test_a_run_with_another_limit_is_another_run(tmp_path):
    with pytest.raises(RuntimeError, match="power"):
        run(bird_vlm(), LIMITED, fails_at=4, out_dir=tmp_path, save_every=3)
    with pytest.raises(ValueError, match="limit_disentangle: 0.2 then, 0.3 now"):
        run(bird_vlm(), replace(LIMITED, limit_disentangle=.3), out_dir=tmp_path, resume=True)
