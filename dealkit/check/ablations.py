"""Checks of the exercises to notebook 04, ablations."""
from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from scipy import stats

from dealkit import metrics
from dealkit.check.result import Hint, Watched, call, exercise, first, other, same
from dealkit.paths import data_path
from dealkit.study import paired_differences
from dealkit.training import DealConfig
from dealkit.training.multipliers import Multipliers

__all__ = ["ex_04_1", "ex_04_2", "ex_04_3", "ex_04_4", "ex_04_5"]


@exercise(start="Start with what else than DEAL's two terms separates the row from each row that you could subtract; "
                "look for one where the answer is: nothing.",
          right="A difference speaks of one thing when its two rows differ in that thing only.")
def ex_04_1(answer):
    """A number: a difference of two shares, such as -0.01."""
    level = pd.read_csv(data_path("birdworld", "study.csv")).groupby("row")["accuracy"].mean()
    row, control, answer = level["ResNet, DEAL"], level["ResNet, contrastive only"], float(answer)
    near = lambda wanted, tolerance=0.0015: abs(answer - wanted) < tolerance
    return None if near(row - control) else first(
        ("no_control", near(row), "This is the level at which the runs end. What do the same steps on the same images "
         "reach without the two terms? Subtract that."),
        ("other_control", near(row - level["contrastive only"]), "The row that you subtract was fine-tuned, but it is "
         "another network: your difference mixes the tower with the two terms."),
        ("pretrained_as_control", near(row - level["pretrained"]), "The row that you subtract was not fine-tuned. "
         "Fine-tuning alone may move the accuracy as well."),
        ("sign", near(control - row), "The sign is wrong: the row minus its control, so that a loss is negative."),
        ("percent", near(100 * (row - control), 0.15), "These are percentage points; wanted is a share from 0 to 1."),
    ) or other("Two rows of the printed table differ in nothing but the two terms. Their names begin alike.")


@exercise(start="Start on the coarse grid: how many places do the maps share, and how many does each one cover? Then "
                "ask which of these counts grow when every place becomes four.",
          right="The product grows with the grid, so its weight belongs to one grid; the two ratios stay.")
def ex_04_2(answer):
    """Three numbers: (product, cosine, soft_iou)."""
    maps = torch.zeros(1, 2, 10, 10)
    maps[0, 0, :2], maps[0, 1, 1:3] = 1, 1                              # 20 places each, 10 of them in common
    fine = maps.repeat_interleave(2, 2).repeat_interleave(2, 3)
    wanted, coarse = ([metrics.overlap(m, kind) for kind in ("product", "cosine", "soft_iou")] for m in (fine, maps))
    product, cosine, soft_iou = (float(value) for value in answer)
    near = lambda value, target: same(value, target, atol=2e-3)
    return None if near([product, cosine, soft_iou], wanted) else first(
        ("coarse_grid", near(product, coarse[0]), "This product belongs to the coarse grid. It is a sum over places: "
         "into how many places has the shared region been cut?"),
        ("mean_over_places", near(product, wanted[0] / 400), "You took the mean over places. The paper's product is "
         "their sum, which is why it depends on the grid."),
        ("product", not near(product, wanted[0]), "The first number is wrong. The product of zeros and ones is one "
         "where both maps are one; count these places on the fine grid."),
        ("no_root", near(cosine, wanted[0] / 80 ** 2), "A length is the root of a sum of squares: where is the root?"),
        ("all_grow", near(cosine, 4 * wanted[1]) or near(soft_iou, 4 * wanted[2]), "You let a ratio grow with the "
         "grid. Its numerator becomes four times as large; what happens to its denominator?"),
        ("counted_twice", near(soft_iou, wanted[0] / 160), "Your union counts the shared places twice: see its max."),
    ) or other("Shade both maps on squared paper and count three areas: shared, covered by one map, covered by any.")


def _table(seed: int, seeds: int) -> pd.DataFrame:
    """Runs of three rows in random order, two metrics each. Pairs differ far more than rows."""
    rng = np.random.default_rng(seed)
    runs = pd.MultiIndex.from_product([("one", "two"), range(seeds), ("control", "new", "another")],
                                      names=["pretrained", "seed", "row"])
    level = np.repeat(0.6 + 0.1 * rng.standard_normal((2 * seeds, 2)), 3, axis=0)
    values = level + np.tile([[0], [0.03], [0.08]], (2 * seeds, 1)) + 0.01 * rng.standard_normal((6 * seeds, 2))
    table = pd.DataFrame(values, runs, ["overlap_cosine", "mass_in_mask"]).reset_index()
    return table.sample(frac=1, random_state=seed).reset_index(drop=True)


@exercise(start="Start by putting the runs of both rows beside each other: one line for each pretraining seed and "
                "fine-tuning seed that both rows have.",
          right="What the two runs of a pair share cancels; the interval is as narrow as differences are steady.")
def ex_04_3(answer):
    """A function of (table, row, baseline, metric) that returns (mean, low, high)."""
    full = _table(1, 5)
    gaps = full[~full.eval("row == 'new' and seed == 1 and pretrained == 'one'")].copy()     # a run is missing,
    gaps.loc[gaps.eval("row == 'control' and seed == 0 and pretrained == 'two'"), "mass_in_mask"] = np.nan   # one NaN
    for table, metric in ((_table(0, 3), "overlap_cosine"), (full, "mass_in_mask"), (gaps, "mass_in_mask")):
        given = mean, low, high = [float(x) for x in call(answer, table.copy(), "new", "control", metric)]
        right = paired_differences(table, "control", [metric]).set_index("row").loc["new"]
        if same(given, right[["mean", "low", "high"]].to_list(), atol=1e-6):
            continue
        if table is gaps:                                               # right on the same table without the gaps
            return Hint("missing_run", "Right with a complete table. Here one run is missing and one is NaN: such a "
                                       "pair is no pair, neither in the mean nor in the number n.")
        return _what_interval(table, metric, mean, (high - low) / 2) or other(
            "Test by hand with three pairs whose differences are 1, 2 and 3: the mean is 2, and s / sqrt(n) is 0.577.")
    return None


def _what_interval(table: pd.DataFrame, metric: str, mean: float, half: float) -> Hint | None:
    runs, controls = (table[table["row"] == row].set_index(["pretrained", "seed"]) for row in ("new", "control"))
    one, base = runs[metric], controls[metric]
    d, both = one - base, one.reset_index().merge(base.reset_index(), on="seed")
    crossed = (both[metric + "_x"] - both[metric + "_y"]).to_numpy()
    near = lambda value, wanted: abs(value - wanted) < 2e-3 * abs(wanted)
    width = lambda d, df: stats.t.ppf(0.975, df) * np.std(d, ddof=1) / len(d) ** 0.5
    n, unit = len(d), width(d, len(d) - 1)
    if metric != "overlap_cosine" and near(mean, (runs["overlap_cosine"] - controls["overlap_cosine"]).mean()):
        return Hint("fixed_metric", "The table has several metrics, and you always read one. Which argument names it?")
    return first(
        ("no_control", near(mean, one.mean()), "Your mean is the level of the row. A level may be the work of lucky "
         "seeds, or of fine-tuning alone; the baseline must be subtracted."),
        ("sign", near(mean, -d.mean()), "The mean has the wrong sign: row minus baseline, so that a gain is positive."),
        ("no_root", near(half, unit * n ** 0.5), "This is the spread of single differences. Their mean is steadier."),
        ("file_order", near(half, width(one.to_numpy() - base.to_numpy(), n - 1)), "You subtracted the runs in the "
         "order in which the table lists them, which is not that of the seeds. Align them by name."),
        ("seed_alone", near(half, width(crossed, len(crossed) - 1)), "The fine-tuning seed alone does not name a pair, "
         "for runs from two pretraining seeds share it. Count your differences; there are too many."),
        ("fixed_number", n != 6 and any(near(half, stats.t.ppf(0.975, 5) * d.std() / k ** 0.5) for k in (n, 6)), "This "
         f"is right for six pairs, and here are {n}: count the pairs of the table that you are given."),
        ("unpaired", half > 1.5 * unit, "Your interval is several times too wide. It holds the scatter of the levels, "
         "which both runs of a pair share; take the spread of the differences."),
        ("normal", any(near(half / unit * stats.t.ppf(0.975, n - 1), z) for z in (1.96, 2)), "This is the factor of a "
         "normal distribution. With few pairs the spread is itself uncertain, and Student's t is wider."),
        ("population", near(half, unit * (1 - 1 / n) ** 0.5), "Your standard deviation divides by n. The differences "
         "are taken from their own mean, so divide by n - 1."),
        ("degrees_of_freedom", any(near(half, width(d, k)) for k in (n - 2, n, 2 * n - 2, 2 * n - 1, 2 * n)),
         "Student's t is right, its degrees of freedom are not: n differences around their own mean leave n - 1."),
    ) if near(abs(mean), abs(d.mean())) or near(mean, one.mean()) else None


def _ascend(weight, values, limit, rate, mistake: str) -> list[float]:
    """The weights after each step by a rule that is wrong in the way that its name says."""
    mu, weights = weight * limit, []
    for value in values:
        violation = value / limit - 1
        violation *= {"descent": -1, "mixed_units": limit, "not_relative": limit ** 2}.get(mistake, 1)
        mu = (weight * limit if mistake == "starts_anew" else mu) + rate * violation
        mu = mu if mistake in ("no_floor", "floor_at_end") else max(0.0, mu)
        weights.append(mu if mistake == "multiplier" else mu / limit)
    return [max(0.0, w) for w in weights] if mistake == "floor_at_end" else weights


_STEPS = {
    "descent": "Your weight falls while the maps overlap too much. The multiplier climbs where the training descends.",
    "multiplier": "These are the multipliers of R / limit <= 1. The weight of the loss is multiplier divided by limit.",
    "mixed_units": "Your weight moves by the rate times (R / limit - 1). So does the multiplier, in another unit.",
    "not_relative": "Your weight moves by the rate times (R - limit). In the equation the violation is relative.",
    "no_floor": "A weight is negative, and the loss rewards overlap. The multiplier of an inequality stops at zero.",
    "floor_at_end": "The floor lies under the finished list only; below it the multiplier ran on. Each step needs it.",
    "starts_anew": "Every step starts from the first weight. Each one goes on from where the last one stopped."}


@exercise(start="Start with one step: turn the weight into the multiplier of the constraint R / limit <= 1, move that "
                "by the rate times the violation, and turn it back.",
          right="The weight looks for the value at which the constraint holds, and fades where it holds anyway.")
def ex_04_4(answer):
    """A function of (weight, values, limit, rate) that returns the list of weights after each step."""
    for case in ((3.0, [0.3, 0.2, 0.05, 0.25], 0.1, 0.02), (0.04, [1.0, 0.5, 9.0, 0.1, 0.1, 12.0], 4.0, 0.15)):
        weight, values, limit, rate = case
        given = [float(x) for x in call(answer, weight, list(values), limit, rate)]
        multipliers, wanted = Multipliers(DealConfig(lambda_disentangle=weight, limit_disentangle=limit,
                                                     multiplier_rate=rate)), []
        for value in values:
            multipliers.update({"disentangle": value})
            wanted.append(multipliers.weights["disentangle"])
        if same(given, wanted, atol=1e-7):
            continue
        if any(same(given, ([weight] + wanted)[:length], atol=1e-7) for length in (len(values), len(values) + 1)):
            return Hint("one_step_early", "Your list begins with the weight before the first step, not after it.")
        return first(*((mistake, same(given, _ascend(*case, mistake), atol=1e-7), text)
                        for mistake, text in _STEPS.items())) or other(
            "Test by hand: weight 1, limit 1, rate 0.5 and the values 3 and 0 give the weights 2 and 1.5.")
    return None


# What each row of the check's study shows beyond its control, on validation and on test birds: overlap, dead maps,
# accuracy, mass in mask. "steady" is right; "blunt" is best by its masks, and best of the admissible on the test split.
_OUTCOMES = {"steady": {"validation": (-0.15, 0, 0, -0.1), "test": (-0.13, 0, 0, 0.05)},
             "blunt": {"validation": (-0.05, 0, 0.005, 0.4), "test": (-0.2, 0, 0.01, 0.12)}} | {
    kind: {"validation": outcome, "test": outcome} for kind, outcome in {
        "collapsed": (-0.28, 0.4, 0, 0.02), "fading": (-0.23, 0.02, 0, 0.07),
        "costly": (-0.24, 0, -0.05, 0.08), "slipping": (-0.22, 0, -0.02, 0.08)}.items()}


class _Laboratory:
    """Stands in for `run`: outcomes that differ from seed to seed more than from row to row, and who asked for them."""

    def __init__(self, kinds: dict[str, str], accuracy: float):
        self.kinds, self.accuracy, self.asked, self.validation = kinds, accuracy, [], []

    def __call__(self, row, seed, split):
        self.asked.append((row, seed, split))
        overlap, dead, accuracy, mass = _OUTCOMES[self.kinds[row]][split] if row in self.kinds else (0, 0, 0, 0)
        luck = 0.02 * np.sin(5 * seed + (split == "test"))              # the same for all rows of a seed
        mass += 0.3 + 4 * luck + 0.002 * np.sin(7 * seed + len(self.kinds.get(row, "")))
        found = Watched({"overlap_cosine": 0.3 + luck + overlap, "dead_maps": dead,
                         "accuracy": self.accuracy + luck + accuracy, "mass_in_mask": mass})
        self.validation += [found] if split == "validation" else []
        return found


@exercise(start="Start with the validation split: run all rows and the control with all seeds, and average what can be "
                "known without masks. The test split comes after the choice.",
          right="Chosen on validation birds without masks, and held against its control, seed by seed, on birds "
                "that had no part in the choice.")
def ex_04_5(answer):
    """A function of (run, rows, control, seeds) that returns (the chosen row, its gain in mass in mask)."""
    bad = ["collapsed", "costly", "fading", "slipping"]
    for names, control, seeds, accuracy in (("ABCDEF", "none", [0, 1, 2], 0.9), ("zyxwvu", "base", [5, 9, 11, 8], 0.7)):
        lab = _Laboratory(dict(zip(names, [*bad, "blunt", "steady"])), accuracy)
        chosen, gain = call(answer, lab, sorted(names), control, list(seeds))
        if hint := _what_choice(lab, control, seeds, chosen, float(gain)):
            return hint
    lab = _Laboratory(dict(zip("pqrs", bad)), 0.8)                      # nothing is admissible
    try:
        given = answer(lab, list("pqrs"), "plain", [3, 4])
        good = given[0] == "plain" and same(float(given[1]), 0.0)
    except Exception as error:
        given, good = f"{type(error).__name__}: {error}", False
    tested = {row for row, _, split in lab.asked if split == "test"}
    return None if good and tested <= {"plain"} else Hint(
        "nothing_admissible", f"With no admissible row your answer is {given}. What does the statement say then?")


def _what_choice(lab, control, seeds, chosen, gain) -> Hint | None:
    tested, seen = ({(row, seed) for row, seed, split in lab.asked if split == s} for s in ("test", "validation"))
    read = any("mass_in_mask" in found.read for found in lab.validation)
    level = lambda row, split: np.mean([lab(row, seed, split)["mass_in_mask"] for seed in seeds])
    kind, mean = lab.kinds.get(chosen), level(chosen, "test") - level(control, "test")
    runs = lambda row: len([name for name, _ in seen if name == row])
    return first(
        ("chosen_on_test", bool({row for row, _ in tested} - {chosen, control}), "More rows than the chosen one and "
         "its control were run on the test split. A result on birds that took part in the choice is too good."),
        ("other", kind is None, "Return a row's name first, then its gain; here one of the rows is admissible."),
        ("one_seed", runs(chosen) < len(seeds), "The choice rests on a part of the seeds. A row that wins with one of "
         "them may have been lucky."),
        ("collapse", kind == "collapsed", "The chosen row has the least overlap and many dead maps, which overlap with "
         "nothing. Look at the other columns."),
        ("accuracy_lost", kind == "costly", "The chosen row loses several points of accuracy against the control."),
        ("dead_limit", kind == "fading", "Two in a hundred maps of the chosen row are dead. How many are admissible?"),
        ("accuracy_limit", kind == "slipping", "The chosen row's accuracy is 0.02 below the control's: too much."),
        ("masks", kind == "blunt", "The chosen row is not the admissible one with the least overlap on validation "
         "birds, but the best by its masks. Masks may report, not choose."),
        ("control_seeds", runs(control) < len(seeds), "The control's accuracy rests on some of the seeds, not on all."),
        ("no_control", same(gain, level(chosen, "test")), "Your gain is the level of the chosen row. Fine-tuning alone "
         "reaches some level, too: subtract the control's."),
        ("reported_on_validation", same(gain, level(chosen, "validation") - level(control, "validation")), "The gain "
         "was measured on the birds on which the row was chosen. Report it on the test split."),
        ("unpaired_seeds", tested != {(row, seed) for row in (chosen, control) for seed in seeds}, "On the test split "
         "the chosen row and its control were not run with all the same seeds, which differ by more than rows do."),
        ("other", not same(gain, mean), "The gain is wrong: mass in mask on test birds, row minus control, all seeds."),
        ("masks_read", read, "Right, but mass_in_mask was read on validation birds. The choice may not know it: "
         "read it on the test split only."))
