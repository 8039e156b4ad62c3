"""Checks of the exercises to notebook 03, fine-tuning with DEAL."""
from __future__ import annotations

import numpy as np
import torch
from scipy import stats

import dealkit
from dealkit.check.result import Hint, Watched, call, exercise, first, other, recognise, same

__all__ = ["ex_03_1", "ex_03_2", "ex_03_3", "ex_03_4", "ex_03_5"]

_CHOSEN = {
    "b": ("last_layer", "Statement b: a term trains a weight only through a graph. Where could one start here?"),
    "c": ("raises", "Statement c: try (x + 3).backward() with an x that requires a gradient. Does the 3 stop it?"),
    "e": ("larger_weight", "Statement e: a weight multiplies a gradient. What is 100 times that of a constant?"),
    "f": ("first_order", "Statement f: this would hold if one factor of the map stayed attached. Which one does?"),
    "g": ("no_control", "Statement g: the maps move with the weights, whatever trains these. What must stand beside "
                        "the curve before you name its cause?")}
_LEFT_OUT = {
    "a": ("frozen_values", "Statement a: the value is computed anew in each step. Do the weights behind it stay?"),
    "d": ("same_weights", "Statement d: take the gradient of the total, cross out the zeros. Which run has the rest?")}


@exercise(start="Start with one weight of the tower: write the total's gradient as three summands. Which vanish?",
          right="Detached maps train nothing. Their loss is logged and may even fall; only a control tells why.")
def ex_03_1(answer):
    """The set of the letters of all true statements, such as {"b", "f"}."""
    letters = {letter.lower() for item in answer for letter in item}
    if letters - {*_CHOSEN, *_LEFT_OUT}:
        return Hint("not_a_letter", 'The statements are a to g. Give each letter as a string of its own: {"b", "f"}.')
    found = [hint for letter, hint in _CHOSEN.items() if letter in letters]
    found += [hint for letter, hint in _LEFT_OUT.items() if letter not in letters]
    return Hint(*found[0]) if found else None


def _stretch(maps, dim=(-2, -1)):
    """Min-max over the right axes, or over those that a mistake takes."""
    low, high = maps.amin(dim, keepdim=True), maps.amax(dim, keepdim=True)
    return (maps - low) / (high - low)


def _maps(*shape, seed):
    """Maps with minima above 0 and ranges of their own, so that every way to normalise gives another value."""
    generator = torch.Generator().manual_seed(seed)
    return (0.5 + torch.rand(*shape[:-2], 1, 1, generator=generator)) * (0.2 + torch.rand(*shape, generator=generator))


_ONE_RANGE = ("A range is taken over more than one map, so a map changes with the company it is in. Print the extremes "
              "of every single map: they must be 0 and 1.")


def _averages(per_image, pixels):
    """Mistakes in the averages, which both losses share."""
    return {"not_averaged": ("The images of the batch are not averaged, so a larger batch would weigh more.",
                             per_image, per_image.sum()),
            "mean_over_pixels": ("The value is too small by the number of pixels. What does the equation do with p?",
                                 per_image.mean() / pixels)}


def _gradients(loss, inputs):
    """The value of a loss, and its gradient with respect to every argument (None: it has no graph)."""
    leaves = [m.clone().requires_grad_() for m in inputs]
    value = call(loss, *(leaf.clone() for leaf in leaves))           # clones: the answer may work in place
    graph = getattr(value, "requires_grad", False)
    return value, torch.autograd.grad(value, leaves, materialize_grads=True) if graph else None


def _what_loss(answer, loss, inputs, guesses, by_hand):
    """What is wrong with a loss: with its value, then with its gradient, then with both where maps are constant."""
    value = call(answer, *(m.clone() for m in inputs))
    if hint := recognise(value, guesses, 1e-6):
        return hint
    if shape := list(torch.as_tensor(value).shape):
        return Hint("shape", f"Your value has the shape {shape}. A loss is a scalar, of shape []: which axis is left?")
    if not same(value, loss(*inputs)):
        return other(by_hand)
    found, wanted = _gradients(answer, inputs)[1], _gradients(loss, inputs)[1]
    if found is None:
        return Hint("detached", "The value is right, but has no gradient. Follow `requires_grad` line by line.")
    if not all(g.any() for g in found):
        return Hint("one_side_constant", "One of the two kinds of maps gets no gradient. Which side shall stand still?")
    if not all(map(same, found, wanted)):
        return Hint("half_detached", "The value is right, its gradient is not: a factor or a range counts as constant.")
    for constant in range(len(inputs)):                              # one constant map in one argument at a time
        flat = [m.clone() for m in inputs]
        flat[constant].flatten(0, -3)[1] = 0.3
        value, found = _gradients(answer, flat)
        if not same(value, loss(*flat)):
            return Hint("constant_map", "A map that is the same everywhere must count as zero. What do you divide by?")
        if found is None or not all(g.isfinite().all() for g in found):
            return Hint("nan_gradient", "With a constant map the value is right, and the gradient is not finite: 0 / 0 "
                                        "was computed and dropped afterwards. One such step ruins all weights.")


@exercise(start="Begin with the hat: subtract from each map its own minimum and divide by its own range.",
          right="Every pair once, every map on its own range, and the gradient reaches each map.")
def ex_03_2(answer):
    """A function of concept maps [B, K, h, w] that returns a scalar tensor."""
    table = lambda h: h.flatten(2) @ h.flatten(2).mT                 # [B, K, K]
    upper = lambda h, first=1: table(h).triu(first).sum((1, 2)).mean()
    for seed, shape in enumerate([(3, 5, 4, 6), (2, 4, 5, 5)]):
        h = _stretch(maps := _maps(*shape, seed=seed))
        right, squares = upper(h), table(h).diagonal(dim1=1, dim2=2).sum(1).mean()
        guesses = _averages(table(h).triu(1).sum((1, 2)), h[0, 0].numel()) | {
            "mean_over_pairs": ("This is an average over pairs, and equation (1) divides by nothing. Try equal maps.",
                                right / (shape[1] * (shape[1] - 1) / 2)),
            "both_orders": ("Every pair counts twice, as (i, j) and (j, i). Try two equal maps with one bright pixel.",
                            2 * right),
            "diagonal": ("Maps are also paired with themselves. Try maps that do not overlap: is the value zero?",
                         right + squares, 2 * right + squares),
            "pairs_missing": ("Some pairs are never visited. Print the pairs (i, j) for K = 3: there must be 3.",
                              upper(h, 2), right - upper(h, 2), upper(h[:, :-1]), upper(h[:, 1:])),
            "not_normalised": ("The maps enter without the hat, or only divided by their maximum. What is the smallest "
                               "value of each?", upper(maps), upper(maps / maps.amax((2, 3), True))),
            "normalised_over_batch": (_ONE_RANGE, *(upper(_stretch(maps, d)) for d in (
                (0, 2, 3), (0, 1, 2, 3), 0, (1, 2, 3), 1)))}
        by_hand = "Take one image, maps of two pixels: (0, 1) and (1, 0) give 0, (0, 1) twice gives 1."
        if hint := _what_loss(answer, dealkit.disentangle_loss, [maps], guesses, by_hand):
            return hint


@exercise(start="Do the inner bracket first: which shape has the sum of an image's concepts, which its category?",
          right="Pixel by pixel the concepts together are held to what the category shows, and both sides move.")
def ex_03_3(answer):
    """A function of concept maps [B, K, h, w] and category maps [B, h, w] that returns a scalar tensor."""
    square = lambda rest: rest.square().flatten(1).sum(1).mean()
    for seed, shape in enumerate([(3, 4, 5, 4), (2, 5, 3, 6)], 10):
        maps, category = _maps(*shape, seed=seed), _maps(shape[0], *shape[2:], seed=seed + 5)
        c, k = _stretch(maps), _stretch(category)
        rest, wide = c.sum(1) - k, _stretch(category, (0, 1, 2))
        guesses = _averages(rest.square().sum((1, 2)), rest[0].numel()) | {
            "mean_of_concepts": ("The concepts are averaged at each pixel. Parts that each fill a place of their own "
                                 "would reach only a share of the category; equation (2) adds.", square(c.mean(1) - k)),
            "max_of_concepts": ("This takes the strongest concept of each pixel, as Birdworld's preset does. In "
                                "equation (2) overlapping concepts add up above 1.", square(c.amax(1) - k)),
            "stretched_again": ("What the concepts make together is stretched itself. Over what does the hat stand?",
                                square(_stretch(c.sum(1)) - k), square(_stretch(maps.sum(1)) - k)),
            "each_alone": ("Each concept is compared alone. What is summed in the bracket?", square(c - k[:, None])),
            "not_normalised": ("Some maps enter as they come, others stretched to 0 and 1. Look for every hat.", *(
                square(x - y) for x, y in ((c.sum(1), category), (maps.sum(1), k), (maps.sum(1), category)))),
            "normalised_over_batch": (_ONE_RANGE, square(c.sum(1) - wide), *(
                square(_stretch(maps, d).sum(1) - y) for d in ((0, 2, 3), (0, 1, 2, 3), (1, 2, 3)) for y in (k, wide)))}
        by_hand = "Take two pixels, concepts (0, 1) and (1, 0), category (0, 1): the value must be 1."
        if hint := _what_loss(answer, dealkit.localize_loss, [maps, category], guesses, by_hand):
            return hint


@exercise(start="First the texts: a caption for each image, its concepts, its category. Then embeddings, then maps.",
          right="One number, made without a mask, whose whole gradient arrives in the first block.")
def ex_03_4(answer):
    """A function (vlm, batch, categories, bank, weight_disentangle, weight_localize) that returns a scalar tensor."""
    vlm, bank = dealkit.load_model("birdworld-vit", "seed1", "cpu"), dealkit.load_concepts("birdworld")
    birds = dealkit.datasets.Birdworld("train", 64, seed=5)
    some = birds.batch(birds.labels.argsort(kind="stable")[[0, 1, 9, 17, 33]])       # two of one species, and two whose
    some["label"] = some["label"][[0, 1, 2, 4, 3]]                   # labels are exchanged, so that every term is large
    names = [birds.categories[y] for y in some["label"]]
    prompts = [f"a photo of a {name}" for name in names]
    pair = vlm.encode_image(some["image"]), vlm.encode_text(prompts), vlm.logit_scale
    live = dealkit.explain(vlm, some["image"], [[*bank[n], p] for n, p in zip(names, prompts)], create_graph=True)
    clip, mixed = dealkit.contrastive_loss(*pair, some["label"]), dealkit.disentangle_loss(live)
    overlap, rest = dealkit.disentangle_loss(live[:, :-1]), dealkit.localize_loss(live[:, :-1], live[:, -1])
    block = [*vlm.model.visual.conv1.parameters(), *vlm.model.visual.transformer.resblocks[0].parameters()]
    gradient = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(
        loss, block, retain_graph=True, materialize_grads=True)])
    for a, b in ((0.1, 0.02), (0.03, 0.05)):
        ask = lambda batch: call(answer, vlm, batch, birds.categories, bank, a, b)
        batch, terms = Watched(some), a * overlap + b * rest
        value = ask(batch)
        if not same(value, clip + terms):
            if "part_masks" in batch.read or not same(value, ask(some | {"part_masks": ~some["part_masks"]})):
                return Hint("masks_in_training", "The loss reads `part_masks`. DEAL trains without annotation, and a "
                                                 "mask that was trained on cannot judge the maps any more.")
            return recognise(value, {
                "contrastive_missing": ("Nothing here keeps the model able to name a species. Which term is left out?",
                                        terms),
                "false_negatives": ("Two images are of one species; their captions count as each other's negatives.",
                                    dealkit.contrastive_loss(*pair) + terms),
                "weights_mixed_up": ("The weights are exchanged or unused. Try (0, 0), (1, 0) and (0, 1) in turn.",
                                     clip + b * overlap + a * rest, clip + overlap + rest),
                "category_among_concepts": ("The category's map counts as a concept. How many maps enter each term?",
                                            clip + a * mixed + b * rest,
                                            clip + a * mixed + b * dealkit.localize_loss(live, live[:, -1])),
            }, 1e-6) or other("With weights (0, 0), (1, 0) and (0, 1), the differences must be the terms of dealkit.")
        if not getattr(value, "requires_grad", False):
            return Hint("no_graph", "The number is right, but it has no graph, so nothing is trained. What cuts it?")
        got, whole, plain = gradient(value), gradient(clip + terms), gradient(clip)
        if (got - plain).norm() < 0.02 * (whole - plain).norm():
            return Hint("maps_constant", "Only the contrastive term arrives in the first block. Have the maps a graph?")
        if (got - whole).norm() > 0.02 * whole.norm():
            return Hint("partly_constant", "In the first block part of the gradient is missing. Test each term alone.")


class _Runs:
    """Pretended runs: far apart between seeds, close within a pair; validation and test favour different weights."""

    def __init__(self, **accuracies):
        self.accuracies, self.calls = accuracies, []                 # split -> weight -> accuracy

    def __call__(self, weight, pretrained, seed, split, masks=False):
        self.calls.append((weight, (pretrained, seed), split, masks))
        key, own = [*pretrained.encode(), seed], [int(10 * weight), len(split)]
        pair, noise = (np.random.default_rng(k).normal() for k in (key, key + own))
        row = {"accuracy": self.accuracies[split][weight] + 0.002 * noise, "overlap": 0.6 / (1 + weight)}
        return row | ({"mass_in_mask": 0.4 + 0.1 * pair + 0.02 * noise + 0.1 * (weight > 0)} if masks else {})


@exercise(start="Write the choice first: one number for each weight, averaged over its pairs, from validation alone.",
          right="Chosen where nothing is reported, compared on the same seeds, with an interval over pairs.")
def ex_03_5(answer):
    """A function (run, weights, choose_pairs, report_pairs) that returns four numbers: weight, mean, low, high."""
    # No weight is also a place in the list: whoever returns the place must be told so.
    for best, held, shown in ((2.5, {1.5: .9, 2.5: .88, 4.5: .5}, {1.5: .97, 2.5: .6, 4.5: .5}),
                              (3.6, {.6: .95, 1.2: .9, 3.6: .86, 9.5: .1}, {.6: .95, 1.2: .97, 3.6: .5, 9.5: .1})):
        run = _Runs(validation={0.0: .9} | held, test={0.0: .9} | shown)
        choose, report = [("a", 100), ("b", 100)], [(tag, s) for tag in "ab" for s in range(len(held) - 1)]
        chosen, mean, low, high = (float(x) for x in call(answer, run, list(held), choose, report))
        on_test, chose_on = ({w: {pair for v, pair, at, _ in run.calls if v == w and at == split} for w in (0.0, *held)}
                             for split in ("test", "validation"))
        treated, control = on_test.get(chosen, set()), on_test[0.0]
        ours, base = (np.array([run(w, *pair, "test", True)["mass_in_mask"] for pair in report]) for w in (best, 0.0))
        gain, half, n, spread = ours - base, (high - low) / 2, len(report), (ours - base).std(ddof=1)
        student, normal, root = stats.t.ppf(.975, n - 1), stats.norm.ppf(.975), n ** .5
        apart = ((ours.var(ddof=1) + base.var(ddof=1)) / n) ** .5
        if hint := first(
            ("masks_in_choosing", any(masks and split == "validation" for *_, split, masks in run.calls),
             "Masks are read while the weight is chosen. They judge the method, so nothing may be fitted to them."),
            ("not_a_weight", chosen not in held, "The first number is none of `weights`. Is it a place in the list?"),
            ("chosen_on_test", any(on_test[w] for w in held if w != chosen), "A weight that is not reported was run on "
             "the test split. What is left then for an unbiased report?"),
            ("chosen_on_report_pairs", any(chose_on[w] & {*report} for w in held), "`report_pairs` took part in the "
             "choice, so their luck counts twice."),
            ("pairs_left_out", any(chose_on[w] != {*choose} for w in held), "Not every weight was run on validation "
             "with all of `choose_pairs`. A single pair can favour a weight by luck."),
            ("rule_changed", chosen != best, "Not the weight that the rule picks: it weighs accuracy and overlap."),
            ("no_control", not control, "No run with weight 0 on the test split: what does training alone do?"),
            ("seeds_reused", bool(treated & {*choose}), "The pairs of seeds that chose the weight also report it."),
            ("other_seeds", control != treated, "Control and DEAL have other seeds. Which difference is DEAL's?"),
            ("other", not same(mean, gain.mean(), 1e-6), "The mean is that of mass_in_mask, DEAL minus control."),
            ("unpaired", any(same(half, q * apart, 1e-6) for q in (student, normal, stats.t.ppf(.975, 2 * n - 2))),
             "The interval treats both groups as independent. Subtract within each pair before you take a spread."),
            ("normal_quantile", same(half, normal * spread / root, 1e-6),
             "With so few pairs, 1.96 makes the interval too narrow. Which distribution knows their number?"),
            ("population_deviation", same(half, student * gain.std() / root, 1e-6),
             "The spread divides by the number of pairs; a sample's mean is estimated too. What is numpy's ddof?"),
            ("spread_of_runs", same(half, student * spread, 1e-6),
             "This is where single runs lie. The mean of several pairs is known better than one of them."),
            ("other", not same([low, high], gain.mean() + np.array([-1, 1]) * student * spread / root, 1e-6),
             "Compare with scipy.stats.ttest_1samp(differences, 0).confidence_interval().")):
            return hint
