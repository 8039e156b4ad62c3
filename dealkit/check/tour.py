"""Checks of the exercises to notebook 00, the tour."""
from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from dealkit import metrics
from dealkit.check.result import Hint, call, exercise, other, same
from dealkit.paths import data_path
from dealkit.study import paired_differences

__all__ = ["ex_00_1", "ex_00_2", "ex_00_3", "ex_00_4", "ex_00_5"]

_METRICS = ["overlap_cosine", "pointing_game", "mass_in_mask", "dead_maps", "accuracy", "concept_accuracy",
            "worst_group_accuracy"]


def _recognise(value, guesses):
    """The hint of the first mistake whose value this is, from (name, value, text)."""
    return next((Hint(name, text) for name, wrong, text in guesses if same(value, wrong)), None)


@exercise(start="Start with the overlap: what is the inner product of a map of zeros with any other map?",
          right="The dead model has the best overlap that there is. Only the other three give it away, so an "
                "overlap is never quoted alone.")
def ex_00_1(answer):
    """A dict with the four keys "overlap_cosine", "pointing_game", "mass_in_mask" and "dead_maps": numbers."""
    zeros, mask = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 8, 8, dtype=torch.bool)
    mask[..., 4:] = False
    wanted = {"overlap_cosine": metrics.overlap(zeros), "pointing_game": metrics.pointing_game(zeros, mask),
              "mass_in_mask": metrics.mass_in_mask(zeros, mask), "dead_maps": metrics.dead_maps(zeros)}
    given = {name: float(answer[name]) for name in wanted}
    if any(map(math.isnan, given.values())):
        return Hint("undefined", "One of your numbers is not a number. The text says what 0 / 0 counts as here; a "
                                 "table in which such rows drop out would hide the dead model.")
    if given["dead_maps"] == 0:
        return Hint("no_dead_map", "You say that no map is dead. Read the last definition again: which maps does it "
                                   "count, and how many of this model's maps are of that kind?")
    if given["overlap_cosine"] == 1:
        return Hint("equal_maps", "Equal maps have the cosine 1 only if they have a length. Work out numerator and "
                                  "denominator of the cosine for two maps that are zero.")
    if given["pointing_game"] > 0 or given["mass_in_mask"] > 0:
        return Hint("chance", "A map that guesses is right now and then, but this one does not guess: look for the "
                              "spot that stands out, or for the mass that could lie on the part.")
    return None if given == wanted else other("Take a map of 2 by 2 zeros and a mask of one pixel, and apply "
                                              "each of the four definitions with a pencil.")


@exercise(start="Start with the two tables: which one compares DEAL with models that saw the same images and steps?",
          right="The maps overlap less and sit better, and that is all that these runs show. What the control "
                "gains as well is not a gain of DEAL.")
def ex_00_2(answer):
    """A set of names of metrics, such as {"accuracy", "dead_maps"}."""
    study = pd.read_csv(data_path("birdworld", "study.csv")).query("row in ('DEAL', 'contrastive only')")
    deal = paired_differences(study, "contrastive only", _METRICS).set_index("metric")
    shown = set(deal.index[(deal["low"] > 0) | (deal["high"] < 0)])
    given = set(answer)
    if isinstance(answer, str) or given - set(_METRICS):
        raise ValueError(f"the metrics are {', '.join(_METRICS)}")
    extra, missing = given - shown, shown - given
    if "concept_accuracy" in extra:
        return Hint("no_control", "The accuracy on concepts is higher than before fine-tuning. Look at what the "
                                  "control reached, which had the same images and steps and none of DEAL's terms.")
    if "dead_maps" in extra:
        return Hint("nothing_moved", "An interval from 0 to 0 says that all pairs agree that nothing changed, not that "
                                    "a change is certain.")
    if extra:
        return Hint("interval_holds_zero", "For one of your metrics the interval reaches from below zero to above it: "
                                           "these runs allow a gain, a loss, and no change.")
    if "overlap_cosine" in missing:
        return Hint("fall_left_out", "A change may be a fall. Which metric is better when it is smaller, and on which "
                                     "side of zero does its whole interval lie?")
    return Hint("left_out", "One more metric has an interval that lies on one side of zero as a whole; go through the "
                            "rows one by one.") if missing else None


@exercise(start="Start with the brightest patch of each map: flatten height and width, take the place of the maximum.",
          right="A peak is a place, and a place has a name only where a mask says so. With this one function a "
                "miss becomes a fact that can be counted: a miss on which part?")
def ex_00_3(answer):
    """A function of maps [B, K, h, w] and masks [B, P, H, W] that returns whole numbers [B, K]."""
    generator = torch.Generator().manual_seed(3)
    for height, width, side in ((6, 6, 8), (7, 4, 10), (3, 5, 5)):    # the square first: there swapped axes do not stop
        maps, flat = torch.rand(3, 4, height, width, generator=generator), torch.arange(height * width)
        if height > width:                                       # peaks where a wrong divisor stays within the image
            maps *= torch.where(flat % height < width, 1, 0.1).view(height, width)
        areas = torch.randint(-1, 5, (3, height * side, width * side), generator=generator)       # one for each pixel
        masks = torch.stack([areas == part for part in range(5)], dim=1)
        value = torch.as_tensor(call(answer, maps.clone(), masks.clone()))
        wanted = _under_peak(maps, areas, side)
        if value.shape != wanted.shape:
            return Hint("shape", f"For 3 images with 4 maps each your result has the shape {tuple(value.shape)}; there "
                                 "is one peak for each image and concept, so it should be (3, 4).")
        if same(value, wanted):
            continue

        def under(maps=maps, side=side, **options):
            return _under_peak(maps, areas, side, **options)
        return _recognise(value, [
            ("none_is_no_head", wanted.clamp(min=0), "Where the peak lies on no part you answer 0, which is the head. "
             "The place of the maximum among five times False is 0 too: ask first if any is True."),
            ("pixel_mean", under(maps.mean(1, keepdim=True).expand_as(maps)), "All concepts of an image get the same "
             "part: you average its maps before you look for the peak. Each map has a peak of its own."),
            ("corner", under(offset=0), "You look at the first pixel of the patch, its top left corner. The question "
             "is about the pixel in its middle, half a patch further down and to the right."),
            *(("fixed_side", under(side=size, offset=4), f"Here a patch covers {side} x {side} pixels, and you count "
               "with 8, the side in this notebook. The two shapes together say how large a patch is.")
              for size in (8, side)),
            *(("off_by_one", under(offset=offset), f"With s = {side} your pixel is a row and a column off the middle. "
               "Compare your rounding with that of the statement, for an even and for an odd s.")
              for offset in ((side - 1) // 2, (side + 1) // 2)),
            ("rows_and_columns", under(moved=(flat % width, flat // width)), "Rows and columns have changed places. "
             "Which is the quotient of the flat index and the width, and which is the remainder?"),
            *(("height", under(moved=(flat // down, flat % right)), "You divide by the height, and this grid has 7 "
               "rows and 4 columns. How many patches are counted before a new row begins?")
              for down, right in ((height, width), (height, height), (width, height)))]) or other(
            "Try a map of 2 x 3 with one 1 in the last column, and masks of 4 x 6 with one part on the right half.")
    return None


def _under_peak(maps, areas, side, offset=None, moved=None):
    """Part under the peak, from an image of part numbers: not the way of the exercise, so that it checks it."""
    image, _, *place = (F.max_pool2d(maps, maps.shape[-2:]) == maps).nonzero().T
    if moved:                                                    # to where a wrong way back from the flat index leads
        place = [axis[place[0] * maps.shape[-1] + place[1]] for axis in moved]
    row, column = ((axis * side + (side // 2 if offset is None else offset)).clamp(max=size - 1)
                   for axis, size in zip(place, areas.shape[1:]))
    return areas[image, row, column].view(maps.shape[:2])


# exercise 4: what a wrong answer gets to hear, and what it compares, as arguments of `_pairs`
_COMPARISONS = [
    ("no_control", "You compare with the pretrained model, which saw no fine-tuning. Which row had DEAL's images and "
     "steps?", *({"control": "pretrained"} | keys for keys in ({}, {"keys": ["pretrained"]}, {"keys": []}))),
    ("half_a_pair", "Two runs are a pair when both seeds agree, that of the weights and that of the order of images. "
     "Yours agree in one, so a run of DEAL meets several controls.", {"keys": ["pretrained"]}, {"keys": ["seed"]}),
    ("unpaired", "Every run of DEAL meets every run of the control. With m runs of each, how many comparisons should "
     "there be?", {"keys": []}),
    ("by_position", "You pair the runs by their place in the table. In the committed file that happens to work; the "
     "check shuffles the rows.", {"by_position": True}),
    ("two_rows", "Several rows of the table have DEAL in their name. You are asked about the one whose whole name is "
     "DEAL.", {"deal": ["DEAL", "DEAL, paper's form"]})]


@exercise(start="Start with two small tables, the runs of DEAL and those of the control, each with both its seeds.",
          right="You compared only runs that share weights and images, so what is left is the loss. Were there "
                "no effect, all six of six pairs would fall on one side with probability 2 / 64.")
def ex_00_4(answer):
    """A function of a table of runs and the name of a metric that returns a number from 0 to 1."""
    cases = [(_runs(seed), metric) for metric in ("mass_in_mask", "accuracy") for seed in range(6)]
    values = [float(call(answer, table.copy(), metric)) for table, metric in cases]

    def shares(**options):
        return [float((deal > control).mean()) for deal, control in (_pairs(*case, **options) for case in cases)]
    pairs, wins = [_pairs(*case) for case in cases], shares()
    if same(values, wins):
        return None
    if same(values[:6], values[6:]):
        return Hint("metric_ignored", "Two metrics get the same numbers from you, though DEAL does not win the same "
                                      "pairs in both. Where does the name of the metric enter?")
    return _recognise(values, [
        ("count", [share * len(deal) for share, (deal, _) in zip(wins, pairs)], "You return the number of pairs that "
         "DEAL wins. A reader who does not know how many pairs there are needs the share."),
        ("of_means", [float(deal.mean() > control.mean()) for deal, control in pairs], "You compare the two means, so "
         "the answer is 0 or 1. Compare within each pair first, and average what you find."),
        ("size", [float((deal - control).mean()) for deal, control in pairs], "You return how large the difference is "
         "on average. Asked for is how often it is positive, whatever its size."),
        ("tie", [float((deal >= control).mean()) for deal, control in pairs], "Some pairs of these tables have two "
         "equal values, and you count them as won."),
        *((name, shares(**options), text) for name, text, *wrong in _COMPARISONS for options in wrong)]) or other(
        "Make a table of two pairs by hand, one won and one lost, in any order of rows: do you get one half?")


def _runs(seed):
    """A table as study.csv, with a large effect of the weights, a smaller one of the order, and shuffled rows."""
    rng, rows = np.random.default_rng(seed), []
    for tag in range(3):
        weights = rng.normal(size=len(_METRICS))
        rows.append(("pretrained", f"seed{tag}", 0, *rng.normal(weights, 0.3)))
        for order in range(4):
            luck = rng.normal(weights, 0.5)
            rows += [(row, f"seed{tag}", order, *rng.normal(luck, 0.3))
                     for row in ("contrastive only", "DEAL", "DEAL, paper's form")]
        rows[-2] = (*rows[-2][:3], *rows[-3][3:])                     # a tie
    table = pd.DataFrame(rows, columns=["row", "pretrained", "seed", *_METRICS])
    return table.sample(frac=1, random_state=seed).reset_index(drop=True)


def _pairs(table, metric, control="contrastive only", keys=("pretrained", "seed"), by_position=False, deal=("DEAL",)):
    """The values of DEAL and of the control, pair by pair."""
    one, two = table[table["row"].isin(deal)], table[table["row"] == control]
    if by_position:
        return one[metric].to_numpy(), two[metric].to_numpy()
    pairs = one.merge(two, on=list(keys)) if keys else one.merge(two, how="cross")
    return pairs[metric + "_x"].to_numpy(), pairs[metric + "_y"].to_numpy()


@exercise(start="Start with the maps of the bird's own concepts, and mass_in_mask with reduction=\"none\".",
          right="Same image, same mask, same part, another colour. The difference is what the map knows about "
                "the colour, and one value an image is what an interval over images needs.")
def ex_00_5(answer):
    """A function of (explain, images, masks, own, wrong) that returns one number for each image, [B]."""
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(3, 3, 16, 16, generator=generator)
    masks = torch.rand(3, 2, 16, 16, generator=generator) < torch.tensor([0.1, 0.4])[:, None, None]
    masks[1, 0] = False                                                                     # a part that is hidden
    own = [["red head", "blue wing"], ["green head", "red wing"], ["blue head", "green wing"]]
    wrong = [["orange head", "yellow wing"], ["purple head", "orange wing"], ["yellow head", "purple wing"]]
    asked = set()

    def explain(images, texts):
        texts = [texts] * len(images) if isinstance(texts[0], str) else texts
        asked.update((float(image[0, 0, 0]), text) for image, row in zip(images, texts) for text in row)
        return torch.stack([torch.stack([_map(image, text) for text in row]) for image, row in zip(images, texts)])

    value = torch.as_tensor(call(answer, explain, images.clone(), masks.clone(), own, wrong))
    if not {text for _, text in asked} & set(sum(wrong, [])):
        return Hint("no_control", "The wrong colours were never asked for. Without them you cannot tell a map that "
                                  "knows the colour from one that finds the part whatever its colour.")
    if {(float(image[0, 0, 0]), text) for image, row in zip(images, wrong) for text in row} - asked:
        return Hint("unpaired", "Some wrong colour was asked of another image than the one it belongs to. Image and "
                                "mask must be the same in both, or the difference is one of images.")
    if value.ndim != 1 or len(value) != 3:
        return Hint("one_number", f"Your result has the shape {tuple(value.shape)}. Return one difference for each "
                                  "image, [B]: an interval over images is computed from such numbers.")
    shown = [explain(images, texts) for texts in (own, wrong)]
    gain, mixed = (torch.sub(*(metrics.mass_in_mask(maps, masks, reduction="none") for maps in pair))
                   for pair in (shown, [maps.mean(1, keepdim=True).expand_as(maps) for maps in shown]))
    if same(value, gain.nanmean(1)):
        return None
    return _recognise(value.nan_to_num(), [
        *(("hidden_part", mean, "In one image a part is hidden, so its mask is empty and its share undefined. Leave "
           "that concept out; it is no zero, and no reason to drop the image.")
          for mean in (gain.nan_to_num().mean(1), value.nan_to_num().where(value.isnan().any(), torch.nan))),
        ("sum_not_mean", gain.nansum(1), "You add up the concepts of an image. An image with more visible parts would "
         "then count for more; take their mean."),
        ("sign", -gain.nanmean(1), "The sign is wrong: a map that knows its colour should come out positive."),
        ("pixel_mean", mixed.nanmean(1), "You average the maps of an image pixel by pixel before you compare them "
         "with the masks. That mean belongs to no concept; take each map with its own part's mask.")]) or other(
        "Take one image and one concept: mass of its own map on the mask, less that of the wrong colour's map on it.")


def _map(image, text):
    """A map that depends on both image and text, on a grid of 4 x 4."""
    noise = torch.rand(4, 4, generator=torch.Generator().manual_seed(sum(map(ord, text))))
    return (noise * F.avg_pool2d(image, 4).mean(0)) ** 2
