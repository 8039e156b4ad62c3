"""Checks of the exercises to notebook 06, what cannot be trusted."""
from __future__ import annotations

import pandas as pd
import torch
from torch.nn.functional import interpolate

from dealkit import metrics, normalize_maps
from dealkit.check.result import Hint, call, exercise, first, other, recognise, same
from dealkit.paths import data_path

__all__ = ["ex_06_1", "ex_06_2", "ex_06_3", "ex_06_4", "ex_06_5", "ex_06_6"]


@exercise(start="Take the statements one by one, and ask of each: must it be true of every run of this code?",
          right="Code says what a run of it does. It is silent on other code, other data and the method.")
def ex_06_1(answer):
    """A set of letters from "a" to "f", such as {"a", "d"}."""
    chosen = {str(letter).strip().lower() for letter in answer}
    if chosen - set("abcdef"):
        raise ValueError(f"{sorted(chosen - set('abcdef'))} is none of the letters a to f")
    ledger = pd.read_csv(data_path("ledger.csv"))
    faults = ledger[ledger["figure"].str.startswith("insertion fidelity", na=False) &
                    ledger["status"].isin(["ran", "read"])]
    follows = {"b"} | ({"e"} if (faults["as_released"] < faults["as_described"]).all() else set())
    wrong = {"a": "We have the code of one commit, and no list of the runs behind the tables: another is possible.",
             "c": "A regulariser without a gradient was not tested. With one it acts: see the end of section 1.",
             "d": "Look at the table of section 1 again: is the value of a detached term zero, or only its gradient?",
             "e": "Find both rows of the insertion fidelity in the ledger; compare as_released with as_described.",
             "f": "Saturated colours and a small model made this figure. A direction may carry over, a size need not."}
    missing = {"b": "Something follows for the weights: what does adding a constant to a loss change in a step?",
               "e": "Something follows from the ledger alone: print the rows whose figure is an insertion fidelity."}
    for letter in sorted(chosen - follows):
        return Hint(f"chose_{letter}", f"({letter}) does not follow. {wrong[letter]}")
    for letter in sorted(follows - chosen):
        return Hint(f"missed_{letter}", f"What you chose is right, and not all. {missing[letter]}")
    return None


@exercise(start="For B = 2, K = 3 write down two lines: the image of each row, and below it the bird of its concept.",
          right="All rows agree only for B = 1 or K = 1, so a test with one image or concept sees nothing.")
def ex_06_2(answer):
    """A list of four whole numbers: the matching rows for (8, 5), (6, 3), (4, 6) and (16, 5)."""
    given, cases = [int(number) for number in answer], [(8, 5), (6, 3), (4, 6), (16, 5)]
    if len(given) != len(cases):
        raise ValueError(f"{len(given)} numbers for {len(cases)} cases")

    def matching(match, first=0):
        return [[row for row in range(first, first + b * k) if match(row, b, k)] for b, k in cases]

    def count(rows):
        return [len(set(found)) for found in rows]

    rows = matching(lambda row, b, k: row % b == row // k)
    mistakes = {
        "always_b": ([b for b, _ in cases], "It is B rows for (8, 5) by chance: write out the 18 rows of (6, 3)."),
        "all_rows": ([b * k for b, k in cases], "Each image occurs K times in both orders, but in other rows. Equal "
                                                "counts and equal shapes say nothing about the order."),
        "counted_from_one": (count(matching(lambda row, b, k: row % b == row // k, first=1)),
                             "Number rows, images and birds from 0, and look at the very first row: it is right."),
        "other_layout": (count(matching(lambda row, b, k: row % k == row // b)),
                         "You have K blocks of B concepts. Flattened lists run bird by bird, K concepts each."),
        "two_cycles": (count(matching(lambda row, b, k: row % b == row % k)),
                       "You let both numbers start again. Only images do; the bird of the concept stays for K rows."),
        "distinct_images": (count([{row % b for row in found} for found, (b, _) in zip(rows, cases)]),
                            "These are images that match at least once. Count rows: in (4, 6) one may match twice.")}
    if given == count(rows):
        return None
    return recognise(given, {mistake: (text, numbers) for mistake, (numbers, text) in mistakes.items()}) or other(
        "Test your rule on B = 2, K = 3: images 0 1 0 1 0 1 meet birds 0 0 0 1 1 1, right in rows 0, 2, 3 and 5.")


@exercise(start="For a single pair of images: how probable is it that both are of class 0? Both of any one class?",
          right="The squares decide, so unequal classes make more false negatives than equally many equal ones.")
def ex_06_3(answer):
    """A function of a batch size and class frequencies [C] that returns a number."""
    uneven = torch.rand(16, generator=torch.Generator().manual_seed(63))
    cases = [(8, torch.full((10,), 0.1)), (48, uneven / uneven.sum()), (5, torch.tensor([0.7, 0.2, 0.1]))]
    given = [float(call(answer, batch, frequency.clone())) for batch, frequency in cases]

    def formula(of):                                         # of B, the probability of one class for a pair, and C
        return [of(batch, float(frequency.square().sum()), len(frequency)) for batch, frequency in cases]

    if same(given, formula(lambda b, p, c: b * (b - 1) * p)):
        return None
    mistakes = {
        "diagonal": (lambda b, p, c: b * b * p, "An image is paired with itself in your count, but its own text is the "
                                                "positive. A batch of 1 must give 0."),
        "half": (lambda b, p, c: b * (b - 1) / 2 * p, "Two images of a class make two false negatives: text j for "
                                                      "image i, and text i for image j."),
        "per_image": (lambda b, p, c: (b - 1) * p, "That is the number in the row of one image; a batch has B rows."),
        "equal_classes": (lambda b, p, c: b * (b - 1) / c, "Right if all classes are equally frequent: you count "
                                                           "classes, and do not look at how frequent each is."),
        "share": (lambda b, p, c: p, "That is the probability for one pair. How many ordered pairs has a batch?")}
    return recognise(given, {mistake: (text, formula(of)) for mistake, (of, text) in mistakes.items()}) or other(
        "Two cases by hand: one class alone gives B (B - 1); two images from two equal classes give 1.")


def _own_image(batch, concepts):
    """Which image belongs to each of the B K rows of maps.flatten(0, 1)."""
    return torch.arange(batch).repeat_interleave(concepts)


@torch.no_grad()
def _curve(score, images, maps, texts, steps, channels=(0, 1, 2), image_of_row=_own_image, blur=metrics.blur):
    """Scores [steps + 1, B K] while pixels are inserted, and those of the whole image [B K], with a fault to choose."""
    shown, text = images[image_of_row(*maps.shape[:2])], texts.flatten(0, 1)
    start, end = blur(shown), blur(shown)
    end[:, list(channels)] = shown[:, list(channels)]
    curve = metrics.replacement_curve(lambda x, k: score(x, text), start, end, maps.flatten(0, 1)[:, None], steps)
    return curve[..., 0], score(shown, text)


def _fidelity(score, images, maps, texts, steps=5, drop=False, **fault):
    """Insertion fidelity [B, K] with a fault to choose; `drop`: one undefined pair makes the whole batch undefined."""
    curve, whole = _curve(score, images, maps, texts, steps, **fault)
    change, rounding = (whole - curve[0]).abs(), 1e-6 * torch.maximum(whole.abs(), curve[0].abs())
    value = ((curve[1:] - curve[0]).abs() / change).clamp(0, 1).mean(0).where(change > rounding, float("nan"))
    return (value * float("nan") if drop and value.isnan().any() else value).view(maps.shape[:2])


def _mistaken_fidelities(score, images, maps, texts, steps):
    """What the usual mistakes make of it: name -> [B K]."""
    inputs = (score, images, maps, texts, steps)
    (curve, whole), (red, _) = _curve(*inputs), _curve(*inputs, channels=[0])
    change, total = curve[1:] - curve[0], whole - curve[0]
    fractions = {"red_only": ((red[1:] - red[0]) / total).abs().clamp(0, 1), "not_clamped": (change / total).abs(),
                 "one_direction": (change / total).clamp(0, 1), "divided_by_score": (change / whole).abs().clamp(0, 1),
                 "step_zero": (change / total).abs().clamp(0, 1) * steps / (steps + 1)}
    return {"lowest_first": _fidelity(score, images, -maps, texts, steps).flatten(),
            **{mistake: fraction.mean(0) for mistake, fraction in fractions.items()}}


@exercise(start="Make B K rows first: which image belongs to row r of maps.flatten(0, 1) and texts.flatten(0, 1)?",
          right="One index for image, map and text; all channels of a pixel; what is undefined says so.")
def ex_06_4(answer):
    """A function of score, images [B, 3, H, W], maps [B, K, H, W], texts [B, K, D] and steps that returns [B, K]."""
    generator, rows = torch.Generator().manual_seed(64), []
    for batch, concepts, height, width, steps in [(3, 2, 6, 10, 5), (4, 3, 8, 8, 4)]:
        images = torch.rand(batch, 3, height, width, generator=generator)
        images[1] = 0                                 # black is its own blur: the pairs of this image are undefined
        maps = torch.rand(batch, concepts, height * width, generator=generator).argsort(-1).float()  # no ties
        maps = maps.unflatten(2, (height, width)) / maps.amax()
        weight = torch.randn(3 * height * width, 7, generator=generator)
        texts = torch.randn(batch, concepts, 7, generator=generator)
        inputs = (lambda x, text: (x.flatten(1) @ weight * text).sum(1)), images, maps, texts, steps
        value, right = torch.as_tensor(call(answer, *inputs)).detach(), _fidelity(*inputs)
        if value.shape != right.shape:
            return Hint("shape", f"{batch} images with {concepts} concepts each are [{batch}, {concepts}] pairs. You "
                                 f"return {list(value.shape)}: give one number a pair, so that no mean hides anything.")
        if value.isnan().all():
            return Hint("all_undefined", "One image is black, and all pairs of the batch became NaN with its own.")
        if (value.isnan() & ~right.isnan()).any():
            return Hint("misaligned", "A black image makes its own pairs undefined, and here others are: row r of the "
                                      "images is not row r of maps and texts. Print all three for B = 2, K = 3.")
        rows.append({"value": value.flatten(), "right": right.flatten(), **_mistaken_fidelities(*inputs)})
    found = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    defined = ~found["right"].isnan()
    if same(found["value"][defined], found["right"][defined]):
        return None if found["value"][~defined].isnan().all() else Hint(
            "undefined_as_number", "A black image is its own blur, so 0 / 0: a number there would count as a result.")
    texts = {"red_only": "With all pixels inserted the score is not back. How many of the 3 H W numbers were written?",
             "lowest_first": "Your curve starts with the map's lowest pixels. Which end does argsort put first?",
             "step_zero": "All values are too small by one factor: step 0, with nothing inserted, is in your mean.",
             "not_clamped": "Some fractions exceed 1: a score may overshoot that of the image. See the equation.",
             "one_direction": "A change in the wrong direction is 0 with you; the numerator of the equation has bars.",
             "divided_by_score": "The last step must give 1 for each pair. Which denominator makes sure of that?"}
    guesses = {mistake: (text, found[mistake][defined]) for mistake, text in texts.items()}
    return recognise(found["value"][defined], guesses) or other(
        "Test a bright bar on black, a map that is the bar, and the bar's mean as score: each step is 1.")


@exercise(start="Which maps share no pixel, and still leave no pixel out? Draw them on 4 x 4 pixels for K = 3.",
          right="The best score, no dead map, every pixel used, and no image was looked at.")
def ex_06_5(answer):
    """A function of B, K, h and w that returns maps [B, K, h, w]."""
    for batch, concepts, height, width in [(2, 5, 10, 10), (1, 2, 7, 7), (3, 3, 7, 5), (2, 7, 2, 4), (1, 6, 2, 3)]:
        maps = torch.as_tensor(call(answer, batch, concepts, height, width)).detach().float()
        where = f"B, K, h, w = {batch}, {concepts}, {height}, {width}: "
        if maps.shape != (batch, concepts, height, width):
            return Hint("shape", f"{where}shape {list(maps.shape)} is not one map for each image and concept.")
        covered = (normalize_maps(maps) > 0).sum(1)          # [B, h, w]: in how many maps a pixel is
        if metrics.dead_maps(maps) == 1:
            return Hint("dead", f"{where}all maps are constant. They reach the bound, but dead_maps shows it.")
        if same(maps, maps[:, :1].expand_as(maps)):
            return Hint("same_place", f"{where}all concepts of an image have one map, which is the worst case.")
        if metrics.overlap(maps, "product") > 1e-6:
            return Hint("overlap", f"{where}after min-max normalisation {int((covered > 1).sum())} pixels are in "
                                   "several maps. To be small there, or to have the sum 1, is not enough.")
        if metrics.dead_maps(maps) > 0:
            return Hint("some_dead", f"{where}a map got no pixel at all. Share them out so that each map has some.")
        if height * width > concepts and (covered.sum((1, 2)) == concepts).all():
            return Hint("one_pixel", f"{where}one pixel a map reaches the bound, but its size shows. Leave none out.")
        if (covered == 0).any():
            return Hint("left_over", f"{where}{int((covered == 0).sum())} pixels are in no map. Does K divide them?")
    return None


def _light_blur(images):
    """Halve and enlarge: another blur, and as right as the module's."""
    return interpolate(interpolate(images, scale_factor=0.5, mode="bilinear"), size=images.shape[-2:], mode="bilinear")


@exercise(start="Build a case whose result is known without a model: what does full insertion give, or a black image?",
          right="Values that are known beforehand catch faults that a mean over real images does not show.")
def ex_06_6(answer):
    """A function of a metric that raises AssertionError if the metric is faulty, and does nothing if it is right."""
    calls = []

    def rejects(**fault):
        def metric(score, images, maps, texts, steps=5):
            calls.append(fault)
            return _fidelity(score, images, maps, texts, steps, **fault)

        def attempt():
            try:
                answer(metric)
            except AssertionError:
                return True
            return False
        return call(attempt)

    faults = {
        "red": (dict(channels=[0]), "The metric that inserts red only passes. Does your score read green and blue, and "
                                    "do you ask for the value with all pixels inserted?"),
        "other_channel": (dict(channels=[2]), "Red is caught, blue alone passes: your score must need all channels."),
        "misaligned": (dict(image_of_row=lambda b, k: torch.arange(b).repeat(k)), "Images in blocks pass. One image or "
                       "one concept cannot show it, nor images that all give the same result."),
        "shifted": (dict(image_of_row=lambda b, k: (_own_image(b, k) + 1) % b), "A metric that gives each map to the "
                    "next image passes. Assert which pairs are undefined, and not only how many."),
        "vanishing": (dict(drop=True), "A metric that is NaN for a whole batch once a pair is undefined passes. "
                                       "Put an undefined pair beside defined ones.")}
    # Right metrics stand among the faulty ones, so that no counting of calls tells them apart.
    order = ["red", "right", "misaligned", "light", "other_channel", "vanishing", "right", "light", "shifted", "right"]
    metric_of = {"right": {}, "light": dict(blur=_light_blur)} | {name: fault for name, (fault, _) in faults.items()}
    found = [(name, rejects(**metric_of[name])) for name in order]
    if not calls:
        return call(lambda: None)                            # the metric was never run: an empty answer
    right, light = ({rejected for name, rejected in found if name == kind} for kind in ("right", "light"))
    missed = [mistake for mistake in faults if (mistake, False) in found]
    return first(
        ("inconsistent", len(right) > 1 or len(light) > 1, "One metric passes once and fails once. Let nothing but the "
         "metric decide: no counter, and no random numbers without a seed."),
        ("rejects_right", True in right, "A right metric fails an assertion. Assert what is exactly known: random maps "
         "have no known fidelity, except with all pixels inserted."),
        ("blur", True in light, "A right metric with a lighter blur fails an assertion. Do not compare with one "
         "implementation: assert what holds for every blur, with a score that any blur changes."),
        ("asserts_nothing", len(missed) == len(faults), "No fault raises an AssertionError: is anything asserted?"),
        *((mistake, True, faults[mistake][1]) for mistake in missed))
