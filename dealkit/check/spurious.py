"""Checks of the exercises to notebook 05, spurious correlations."""
from __future__ import annotations

from functools import lru_cache

import numpy as np
import pandas as pd
import torch

from dealkit.check.result import Hint, Watched, call, exercise, first, other, same
from dealkit.concepts import load_concepts
from dealkit.datasets import Birdworld
from dealkit.maps import explain
from dealkit.metrics import worst_group_accuracy
from dealkit.models import load_model
from dealkit.normalize import normalize_maps
from dealkit.paths import data_path
from dealkit.training.swap import kept_places

__all__ = ["ex_05_1", "ex_05_2", "ex_05_3", "ex_05_4", "ex_05_5"]


@exercise(start="Start with 100 birds and four boxes: right at home or not, right away or not. In which boxes must the "
                "prediction have changed, and in which may it have?",
          right="Two accuracies only bound the flip rate. Errors that cancel are flips, too.")
def ex_05_1(answer):
    """Two shares from 0 to 1: (lowest, highest)."""
    home, away = 0.9, 0.7
    lowest, highest = home - away, (1 - home) + (1 - away)
    low, high = (float(value) for value in answer)
    near = lambda value, wanted: abs(value - wanted) < 1e-3
    return None if near(low, lowest) and near(high, highest) else first(
        ("percent", high > 1, "Give shares from 0 to 1; a flip rate above one would be more birds than there are."),
        ("order", near(high, lowest) and near(low, highest), "Both ends are right and in the wrong order: the lowest "
         "flip rate comes first."),
        ("difference", near(low, lowest) and near(high, lowest), "You took the flip rate for the difference of the "
         "accuracies. A bird wrong at home may be right away: the accuracies cancel it, and it is a flip."),
        ("zero", near(low, 0), "No flip at all would mean the same prediction on both backgrounds for every bird, and "
         "so the same accuracy on both."),
        ("wrong_at_home_stays", near(high, 1 - away), "Your upper end lets every bird that is wrong at home be wrong "
         "away as well. Could these be other birds than those that are wrong away?"),
        ("right_twice_flips", high > highest, "Your upper end is too high. Birds that are right on both backgrounds "
         "got the same name twice; how many of these must there be?"),
    ) or other("Draw the four boxes with their shares; one number is free. Move it to both of its ends and count.")


@exercise(start="Start with the model that fine-tuning without the exchange leaves behind: how many of its predictions "
                "flip, and how many are left with the exchange?",
          right="A remedy is measured from what the same steps without it leave behind.")
def ex_05_2(answer):
    """A share from 0 to 1, such as 0.55."""
    level = pd.read_csv(data_path("birdworld", "study.csv")).groupby("row")[["flipped", "accuracy"]].mean()
    swap, control, before = (level.loc[row, "flipped"] for row in ("swap", "contrastive only", "pretrained"))
    right = lambda row: level.loc[row, "accuracy"]
    errors = 1 - (1 - right("swap")) / (1 - right("contrastive only"))
    answer = float(answer)
    near = lambda wanted: abs(answer - wanted) < 0.005
    return None if near(1 - swap / control) else first(
        ("pretrained_as_control", near(1 - swap / before), "You count from the pretrained model. Fine-tuning alone "
         "removes some flips, too; what the exchange adds is seen against the same steps without it."),
        ("weak_control", near(1 - swap / level.loc["swap, centre kept", "flipped"]), "You count from the exchange with "
         "the centre kept. That asks what the maps are worth, not what the exchange removes."),
        ("difference", near(control - swap), "This is the difference of two flip rates. Asked is which part it is of "
         "the flips that were there."),
        ("share_left", near(swap / control), "This is the share of the flips that is left. Asked is the share that is "
         "gone."),
        ("errors", near(errors), "This is the share of the wrong predictions that is gone. A flip is no error: look at "
         "the column of flips."),
        ("no_control", near(swap), "This is the flip rate of the exchange itself. Without a row to compare it with, it "
         "does not say what was removed."),
    ) or other("Two rows and one column are needed: what was there, what is left, and a division by the former.")


@exercise(start="Start with the two masks: which birds got another name on the other background, and which birds "
                "belong to a group, that is to one home and one background?",
          right="One number says how many predictions hang on the background, the other how bad it gets where "
                "it misleads.")
def ex_05_3(answer):
    """A function of four integer tensors [N] that returns (flip_rate, worst_group)."""
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        label, background = torch.arange(320) % 16, (torch.rand(320, generator=generator) < 0.4).long()
        away = (label % 2 != background).float()
        draw = lambda chance: torch.rand(320, generator=generator) < chance
        wrong = torch.randint(1, 16, (320,), generator=generator)
        predicted = torch.where(draw(0.1 + 0.3 * away + 0.1 * (label % 2)), (label + wrong) % 16, label)
        moved = torch.randint(1, 16, (320,), generator=generator)
        predicted_other = torch.where(draw(0.3), (predicted + moved) % 16, predicted)
        given = call(answer, *(x.clone() for x in (predicted, predicted_other, label, background)))
        flips, worst = (float(x) for x in given)
        hint = _what_shortcut(flips, worst, predicted, predicted_other, label, background)
        if hint:
            return hint
    return None


def _what_shortcut(flips, worst, predicted, predicted_other, label, background) -> Hint | None:
    correct, correct_other = predicted == label, predicted_other == label
    share = lambda values: values.float().mean().item()
    flipped, home = predicted != predicted_other, label % 2
    worst_of = lambda groups: worst_group_accuracy(correct, groups)
    group = [share(correct[(home == h) & (background == b)]) for h in (0, 1) for b in (0, 1)]
    return first(
        ("difference", same(abs(flips), abs(share(correct) - share(correct_other))), "Your flip rate is a difference "
         "of two accuracies. Two birds that change in opposite ways cancel there; compare the names, bird by bird."),
        ("right_to_wrong", same(flips, share(correct & ~correct_other)), "You count only birds that were right and "
         "became wrong. A wrong name that changes with the background hangs on it as well."),
        ("correctness", same(flips, share(correct != correct_other)), "You compare being right with being right. A "
         "bird that is wrong in two different ways has flipped and is missing."),
        ("unflipped", same(flips, share(~flipped)), "This is the share of predictions that stayed. Asked is the share "
         "that changed."),
        ("other", not same(flips, share(flipped)), "The first number is not the share of birds with two names."),
        ("average", same(worst, share(correct)), "Your worst group is the mean over all birds. It hides the small "
         "group in which the background misleads."),
        ("mean_of_groups", same(worst, np.mean(group)), "You took the mean of the four groups. Every group counts "
         "alike then, and the worst one is still hidden."),
        ("best_group", same(worst, max(group)), "This is the group that fares best; the shortcut helps it."),
        ("one_attribute", same(worst, worst_of(background)) or same(worst, worst_of(home)), "Your groups are two: "
         "those of the background, or those of the home. In each, birds at home and away are mixed."),
        ("cells", same(worst, worst_of(label * 2 + background)), "Your groups are 32, one for each species and "
         "background. Home by background are four; the lowest of many small groups is mostly chance."),
        ("other", not same(worst, worst_of(home * 2 + background)), "The second number is not the lowest of four "
         "accuracies. Home is the label modulo two; count the birds in each of your groups."),
    )


@exercise(start="Start with a column of ones beside the tokens and with backgrounds of -1 and +1; then solve for the "
                "weights on the birds of `train`, and on no others.",
          right="What a probe reads counts on birds that it has not seen, for with enough numbers a bird it can "
                "learn noise by heart.")
def ex_05_4(answer):
    """A function of (tokens [N, C], background [N] of 0 and 1, train [N] bool) that returns a share from 0 to 1."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda share: torch.rand(240, generator=generator) < share
    train, background, rare, keeps = draw(0.5), draw(0.5).long(), draw(0.2).long(), torch.arange(240) % 4 == 0
    noise = torch.randn(240, 100, generator=generator)
    ask = lambda tokens, labels: float(call(answer, tokens.clone(), labels.clone(), train.clone()))
    # 1: nothing to read, but nearly as many numbers a bird as birds. 2: easy to read, with a mean far from zero.
    # 3: what tells the background in `train` tells the opposite of most of the others.
    chance = ask(noise, background)
    easy = ask(torch.stack([rare * 2 + 3 + 0.1 * noise[:, 1], 0.01 * noise[:, 0]], 1), rare)
    turned = torch.where(train | keeps, 1.0, -1.0) * (background * 2.0 - 1)
    opposite = ask(torch.stack([turned + 0.1 * noise[:, 2], 0.1 * noise[:, 1]], 1), background)
    kept, by_chance = keeps[~train].float().mean().item(), abs(chance - 0.5) < 0.2
    if by_chance and easy > 0.95 and abs(opposite - kept) < 0.02:
        return _what_leaks(ask, train, rare, noise)
    return first(
        ("wrong_rate", easy < 0.05, "You return the share of wrong answers; asked is the share of right ones."),
        ("same_birds", not by_chance and opposite > 0.95, "On tokens of pure noise your probe is nearly always right: "
         "it is asked about the birds that it was fitted on."),
        ("fitted_on_all", not by_chance and abs(opposite - kept) < 0.02, "You ask only birds outside of `train`, but "
         "the weights have seen them: noise is read far better than by chance."),
        ("scored_on_all", not by_chance, "Noise is read better than by chance: birds of `train` are among those that "
         "you ask."),
        ("swapped_halves", easy > 0.95 and opposite < 0.05, "You fit on the birds outside of `train` and ask those "
         "inside; it is the other way round."),
        ("own_split", easy > 0.95, "You did not split the birds as `train` says: its birds are to be fitted on, and "
         "all others to be asked."),
        ("no_intercept", abs(easy - (rare[~train] == 0).float().mean().item()) < 0.01, "Tokens whose mean is far from "
         "zero are not read, however clear they are: all birds get one answer. What moves a plane off the origin?"),
        ("targets", easy < 0.9, "Easy tokens are read badly. Hold what you fit on, 0 and 1 or -1 and +1, against the "
         "value at which your answer changes."),
    ) or other("Test by hand with tokens of one number that equals the background: every bird must be read.")


def _what_leaks(ask, train, rare, noise) -> Hint | None:
    """What the birds outside of `train` must not touch: the scale of the tokens, and settings such as alpha."""
    sign, outside = rare * 2.0 - 1, ~train & (torch.arange(240) % 3 == 0)
    far = torch.stack([4 + sign * (1 + 1e4 * outside) + 0.1 * noise[:, 1], 0.01 * noise[:, 0]], 1)     # far, and easy
    # The first number tells all in `train`, the second most; outside they disagree, and alpha decides between both.
    # Turn the labels outside around, and every right answer must become a wrong one.
    one, two = sign * torch.where(train, 1, -1), sign * torch.where(train & (noise[:, 2] < -1), -1, 1)
    sums = []
    for scale in (0.005, 0.015, 0.05, 0.15, 0.5):                       # one for each alpha that decides
        sums.append(0)
        for labels in (rare, torch.where(train, rare, 1 - rare)):
            torch.manual_seed(0), np.random.seed(0)                    # a classifier may start at random
            sums[-1] += ask(torch.stack([scale * one, 5 * two], 1), labels)
    return first(
        ("scaled_on_all", ask(far, rare) < 0.95, "Easy tokens are read badly as soon as some birds outside of `train` "
         "have very large ones. What did these birds set?"),
        ("chosen_on_others", max(sums) > 1.02, "Turn the labels outside of `train` around, and right must become "
         "wrong. Your two shares add up to more than 1: something, such as alpha, was chosen by these labels."))


@lru_cache(maxsize=1)
def _model_and_birds():
    return load_model("birdworld-vit", device="cpu"), Birdworld("train", n=12, seed=7), load_concepts("birdworld")


@exercise(start="Start with the maps of each bird's five concepts by the method \"every_exit\", and their union; the "
                "control is the same number of places, found without a look at that bird.",
          right="No mask was read, both arms keep as much, and only one of them knows where the bird is. A "
                "difference between them is the work of the maps.")
def ex_05_5(answer):
    """A function of (vlm, batch, concepts) that returns two bool tensors [B, h, w]: what maps keep, and the control."""
    vlm, birds, bank = _model_and_birds()
    batch, spare = birds.batch(range(6)), birds.batch(range(6, 12))
    concepts = [bank[birds.categories[y]] for y in batch["label"]]

    def ask(values):
        watched = Watched(values)
        kept, control = call(answer, vlm, watched, concepts)
        return torch.as_tensor(kept).bool(), torch.as_tensor(control).bool(), watched.read

    kept, control, read = ask(batch)
    again, lies = ask(batch)[1], {"part_masks": ~batch["part_masks"], "background": 1 - batch["background"]}
    if kept.shape != (6, *vlm.grid) or control.shape != kept.shape:
        return Hint("shape", f"The shapes are {tuple(kept.shape)} and {tuple(control.shape)}; wanted is one place for "
                             f"each patch of the model's grid, {(6, *vlm.grid)}, in both.")
    maps = explain(vlm, batch["image"], concepts, method="every_exit")
    agree = lambda one, two: (one == two).float().mean().item() > 0.99
    counts = [set(k.flatten(1).sum(1).tolist()) for k in (kept, control)]
    stretched = normalize_maps(maps)
    of = lambda union: kept_places(union[:, None], 0.3)
    # A copy of the batch is not watched. A control that is drawn anew changes anyway, and is judged below.
    changes = lambda name: torch.equal(control, again) and not all(
        map(torch.equal, (kept, control), ask(batch | {name: lies[name]})))
    hint = first(
        ("masks", "part_masks" in read or changes("part_masks"), "Your function read `part_masks`. With masks the "
         "exchange would be an upper bound and no method: on photographs there are none."),
        ("background", "background" in read or changes("background"), "Your function read the label of the background. "
         "Who has that label does better to draw balanced batches."),
        ("no_control", torch.equal(kept, control), "Both arms keep the same places, so that nothing could differ "
         "between them. What would keep as much and know less?"),
        ("threshold", len(counts[0]) > 1, "The number of kept places differs from bird to bird. A share of the places "
         "is asked for, and a threshold on the values does not give one."),
        ("unequal_area", counts[0] != counts[1], "The two arms keep different numbers of places. A difference could "
         "then be due to how much is kept instead of where."),
        ("lowest", agree(kept, of(-stretched.amax(1))), "You kept the places where the maps are lowest, which are the "
         "background."),
        ("last_block", agree(kept, kept_places(explain(vlm, batch["image"], concepts), 0.3)), "These are maps of the "
         "last block. Those of every exit point at their parts more often, and the exchange uses them."),
        ("not_normalised", agree(kept, of(maps.amax(1))), "Your union takes raw maps: a concept with large values gets "
         "all places. Stretch each map to 0..1 first."),
        ("mean_over_concepts", agree(kept, of(stretched.mean(1))), "You took the mean over the concepts. A place that "
         "only the head's map shows has a low mean, and the head is cut off; a union is wanted."),
        ("other", not agree(kept, kept_places(maps, 0.3)), "The first tensor is not the 30 highest places of the "
         "union; count the kept places, and draw one."),
        ("not_repeatable", not torch.equal(control, again), "Two calls gave two controls. Draw from a generator "
         "with a fixed seed, so that others can repeat it."))
    for i in range(6 if hint is None else 0):                            # another bird in place i, and in no other
        changed = {name: torch.cat([x[:i], spare[name][i:i + 1], x[i + 1:]]) for name, x in batch.items()}
        if not torch.equal(ask(changed)[1][i], control[i]):
            return Hint("control_sees_bird", "The control of a bird changes with its image, so it may still know where "
                                             "the bird is. It must not look at the image that it serves.")
    return hint
