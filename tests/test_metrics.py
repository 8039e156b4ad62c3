"""Entanglement, localization, accuracy and intervals: by hand, against plain loops, and at their bounds."""

import doctest
import math

import numpy as np
import pytest
import torch

from dealkit import metrics
from dealkit.metrics import (
    classification,
    entanglement,
    faithfulness,
    intervals,
    localization,
    perturbation,
    points,
    similarity,
)


def maps_and_masks(*shape, size, seed=0):
    """Random maps `[B, K, h, w]` and masks of a rectangle each, `[B, K, size, size]`."""
    rng = np.random.default_rng(seed)
    masks = torch.zeros(*shape[:2], size, size, dtype=torch.bool)
    for mask in masks.flatten(0, 1):
        y, x = rng.integers(0, size - 3, size=2)
        mask[y:y + rng.integers(2, 4), x:x + rng.integers(2, 4)] = True
    return torch.from_numpy(rng.random(shape)), masks


@pytest.mark.parametrize("module", [classification, entanglement, faithfulness, intervals, localization, perturbation,
                                    points, similarity])
def test_the_examples_in_the_docstrings_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


# --- entanglement ---------------------------------------------------------------------------------

def test_overlap_by_hand_per_image_and_mean():
    a, b = [[0.0, 3.0], [3.0, 0.0]], [[0.0, 0.0], [2.0, 0.0]]
    maps = torch.tensor([[a, b], [b, b]], dtype=torch.float64)
    assert metrics.overlap(maps, "product", reduction="none").tolist() == [1.0, 1.0]
    assert metrics.overlap(maps, reduction="none").tolist() == pytest.approx([math.sqrt(0.5), 1.0])
    assert metrics.overlap(maps) == pytest.approx((math.sqrt(0.5) + 1) / 2)
    assert isinstance(metrics.overlap(maps), float)


def test_soft_iou_is_the_intersection_over_the_union_of_maps_that_are_masks():
    rng = np.random.default_rng(5)
    masks = rng.random((4, 3, 6, 7)) < 0.4
    expected = [np.mean([(one & other).sum() / (one | other).sum() for one, other in (
        (a, b), (a, c), (b, c))]) for a, b, c in masks]
    maps = 7 * torch.from_numpy(masks).double() - 3                      # normalised inside
    assert metrics.overlap(maps, "soft_iou", reduction="none").tolist() == pytest.approx(expected)
    assert metrics.overlap(maps, "soft_iou") == pytest.approx(np.mean(expected)) and 0.1 < np.mean(expected) < 0.5


@pytest.mark.parametrize("kind", ["cosine", "soft_iou"])
def test_cosine_and_soft_iou_do_not_depend_on_the_grid_and_product_does(kind):
    maps = torch.rand(2, 3, 5, 5, dtype=torch.float64)
    finer = maps.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert metrics.overlap(finer, kind) == pytest.approx(metrics.overlap(maps, kind))
    assert metrics.overlap(finer, "product") == pytest.approx(4 * metrics.overlap(maps, "product"))


def test_disentanglability_has_the_papers_constants():
    for pixels, expected in ((0, 1 / (1 + math.exp(-2))), (20, 0.5), (50, 1 / (1 + math.exp(3)))):
        maps = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
        maps.flatten(2)[..., :pixels] = 1.0  # two equal maps of so many pixels overlap by as many
        assert metrics.disentanglability(maps) == pytest.approx(expected)
    twenty = torch.zeros(2, 8, 8)
    twenty.flatten(1)[:, :20] = 1.0
    maps = torch.stack([twenty, torch.zeros(2, 8, 8)])
    assert metrics.disentanglability(maps, reduction="none").tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-2))])
    assert metrics.disentanglability(maps) == pytest.approx(1 / (1 + math.exp(-1)))  # of the mean overlap, 10


def test_dead_maps_counts_zero_and_constant_maps():
    maps = torch.rand(2, 2, 3, 3)
    maps[0, 1], maps[1, 0] = 0.0, 0.7
    assert metrics.dead_maps(maps, reduction="none").tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert metrics.dead_maps(maps) == 0.5 and metrics.overlap(maps) == metrics.overlap(maps, "soft_iou") == 0.0


# --- localization ---------------------------------------------------------------------------------

def test_an_oracle_scores_one_and_its_complement_zero():
    _, masks = maps_and_masks(6, 3, 1, 1, size=12)
    for metric in (metrics.pointing_game, metrics.mass_in_mask, metrics.iou):
        assert metric(masks.float(), masks) == 1.0
        assert metric((~masks).float(), masks) == 0.0


def test_a_random_map_scores_chance():
    masks = torch.zeros(4000, 2, 8, 8, dtype=torch.bool)
    masks[..., 2:5, 1:6] = True  # 15 of 64 pixels
    maps = torch.rand(masks.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chance, tolerance = 15 / 64, 4 * math.sqrt(15 / 64 * 49 / 64 / 8000)
    assert metrics.pointing_game(maps, masks) == pytest.approx(chance, abs=tolerance)
    assert metrics.mass_in_mask(maps, masks) == pytest.approx(chance, abs=tolerance / 4)
    assert metrics.mass_in_mask(torch.ones_like(maps), masks) == pytest.approx(chance)
    # a random half of the pixels: 7.5 of the mask's 15, united with 24.5 others
    assert metrics.iou(maps, masks) == pytest.approx(7.5 / (15 + 24.5), abs=0.01)


def bilinear(grid, size):
    """Up-sampling in plain Python: a pixel mixes the cells whose centres surround it; outside, the nearest counts."""
    rows, columns = len(grid), len(grid[0])
    fine = np.zeros((size, size))
    for y in range(size):
        for x in range(size):
            v = min(max((y + 0.5) * rows / size - 0.5, 0), rows - 1)
            u = min(max((x + 0.5) * columns / size - 0.5, 0), columns - 1)
            for r in range(rows):
                for c in range(columns):
                    fine[y, x] += max(0, 1 - abs(v - r)) * max(0, 1 - abs(u - c)) * grid[r][c]
    return fine


def test_localization_equals_plain_loops_for_every_image_and_concept():
    maps, masks = maps_and_masks(12, 2, 3, 4, size=9, seed=1)
    maps[:, :, 0, 0] = 0.0
    pointing, mass, iou = (metric(maps, masks, reduction="none") for metric in (
        metrics.pointing_game, metrics.mass_in_mask, metrics.iou))
    for b in range(12):
        for k in range(2):
            fine, mask = bilinear(maps[b, k].tolist(), 9), masks[b, k].numpy()
            top = np.isclose(fine, fine.max(), rtol=1e-9)
            claimed = (fine - fine.min()) / (fine.max() - fine.min()) > 0.5
            assert pointing[b, k].item() == pytest.approx(mask[top].mean())
            assert mass[b, k].item() == pytest.approx(fine[mask].sum() / fine.sum())
            assert iou[b, k].item() == pytest.approx((claimed & mask).sum() / (claimed | mask).sum())
    assert pointing.min() < pointing.max()  # the case holds hits and misses


@pytest.mark.parametrize("metric", [metrics.pointing_game, metrics.mass_in_mask, metrics.iou])
def test_empty_masks_are_undefined_and_left_out_of_the_mean(metric):
    maps, masks = maps_and_masks(2, 2, 6, 6, size=6)
    maps = masks.to(maps)
    masks[1, 0] = False
    values = metric(maps, masks, reduction="none")
    assert values.isnan().tolist() == [[False, False], [True, False]]
    assert metric(maps, masks) == 1.0
    assert math.isnan(metric(maps, torch.zeros_like(masks)))


@pytest.mark.parametrize("metric", [metrics.pointing_game, metrics.mass_in_mask, metrics.iou])
def test_dead_maps_miss_and_scale_does_not_matter(metric):
    maps, masks = maps_and_masks(2, 3, 5, 5, size=10, seed=2)
    assert metric(torch.zeros_like(maps), masks) == 0.0
    for scale in (1e-25, 1e37):
        assert metric(maps.float() * scale, masks) == pytest.approx(metric(maps, masks), rel=1e-4)
    if metric is not metrics.mass_in_mask:
        assert metric(torch.full_like(maps, 0.3), masks) == 0.0


def test_a_peak_on_a_plateau_counts_by_its_share_whichever_way_the_image_is_flipped():
    maps = torch.zeros(1, 1, 3, 3)
    maps[..., 2, 2] = 1.0  # up-sampled to 12 pixels: the corner cell's outer half, 2 x 2 pixels, is the peak
    masks = torch.zeros(1, 1, 12, 12, dtype=torch.bool)
    masks[..., 11, :] = True
    for axes in ((), (2,), (3,), (2, 3)):
        assert metrics.pointing_game(maps.flip(axes), masks.flip(axes)) == 0.5


def test_metrics_of_maps_that_require_grad_carry_no_graph():
    maps, masks = maps_and_masks(2, 2, 4, 4, size=8)
    maps.requires_grad_()
    for values in (metrics.overlap(maps, reduction="none"), metrics.mass_in_mask(maps, masks, reduction="none")):
        assert not values.requires_grad


# --- accuracy and intervals -----------------------------------------------------------------------

def test_accuracy_by_hand():
    scores = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.2, 0.3], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])
    labels = torch.tensor([1, 0, 0, 1])
    assert metrics.accuracy(scores, labels) == 0.5
    assert metrics.accuracy(scores, labels, reduction="none").tolist() == [1, 1, 0, 0]


def test_worst_group_by_hand():
    correct = torch.tensor([True, True, False, True, False, True, False])
    groups = ["b", "b", "b", "a", "a", "b", "c"]
    assert metrics.worst_group_accuracy(correct[:6], np.array(groups[:6])) == 0.5  # b 3/4, a 1/2
    assert metrics.worst_group_accuracy(correct, np.array(groups)) == 0.0  # the only image of c is wrong
    assert metrics.worst_group_accuracy(correct.float(), torch.tensor([7, 7, 7, -1, -1, 7, 7])) == 0.5


def test_the_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    low, high = metrics.bootstrap_interval(values, n=4000)
    error = values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    narrow = metrics.bootstrap_interval(torch.from_numpy(values), n=4000, level=0.5)
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.6745 * error, rel=0.1)


def test_the_bootstrap_draws_images_and_not_their_concepts():
    per_image = np.random.default_rng(1).normal(size=(200, 1))
    clustered = metrics.bootstrap_interval(np.repeat(per_image, 50, axis=1))
    assert clustered == pytest.approx(metrics.bootstrap_interval(per_image))


@pytest.mark.parametrize("shape, n", [((30, 4), 200), ((900_000,), 5)])  # the second is drawn in portions
def test_the_fast_bootstrap_equals_the_generic_one(shape, n):
    values = np.random.default_rng(2).random(shape)
    values[values < 0.2] = np.nan
    generic = metrics.bootstrap_interval(values, statistic=lambda drawn: np.nanmean(drawn), n=n, seed=3)
    assert metrics.bootstrap_interval(values, n=n, seed=3) == pytest.approx(generic)
    assert metrics.bootstrap_interval(values, n=n, seed=4) != pytest.approx(generic)


def test_the_bootstrap_takes_any_statistic_and_undefined_values():
    table = np.stack([np.tile([1.0, 0.0], 50), np.repeat([0.0, 1.0], 50)], axis=1)
    low, high = metrics.bootstrap_interval(table, statistic=lambda t: metrics.worst_group_accuracy(t[:, 0], t[:, 1]))
    assert 0.3 < low < 0.45 < 0.5 < high < 0.6  # the worse of two halves, each right half of the time
    assert all(math.isnan(bound) for bound in metrics.bootstrap_interval(np.full(4, np.nan)))


# --- bad input ------------------------------------------------------------------------------------

MAPS, MASKS = maps_and_masks(2, 3, 4, 4, size=8)
BROKEN, SCORES, LABELS = MAPS.clone(), torch.rand(3, 2), torch.tensor([0, 1, 1])
BROKEN[1, 2, 3, 3] = float("nan")


@pytest.mark.parametrize("call, error, match", [
    (lambda: metrics.overlap(MAPS[0]), ValueError, r"expected 4 axes, \[B, K, h, w\]"),
    (lambda: metrics.overlap(MAPS[:, :1]), ValueError, r"at least two concepts"),
    (lambda: metrics.overlap(MAPS, "dice"), ValueError, r"unknown overlap kind 'dice'"),
    (lambda: metrics.overlap(MAPS, reduction="sum"), ValueError, r"unknown reduction 'sum'; expected one of 'mean'"),
    (lambda: metrics.overlap(BROKEN), ValueError, r"maps hold NaN"),
    (lambda: metrics.disentanglability(MAPS[:0]), ValueError, r"an axis is empty"),
    (lambda: metrics.dead_maps(MAPS.long()), TypeError, r"dtype torch.int64"),
    (lambda: metrics.dead_maps(MAPS.numpy()), TypeError, r"maps is a ndarray; expected a torch tensor"),
    (lambda: metrics.pointing_game(MAPS, MASKS.float()), TypeError, r"masks are torch.float32; expected a bool"),
    (lambda: metrics.pointing_game(MAPS, MASKS.tolist()), TypeError, r"masks are list"),
    (lambda: metrics.pointing_game(MAPS, MASKS[:1]), ValueError, r"B, K = \(2, 3\) as in the maps"),
    (lambda: metrics.mass_in_mask(MAPS, MASKS[:, :2]), ValueError, r"one mask per image and concept"),
    (lambda: metrics.mass_in_mask(MAPS - 0.5, MASKS), ValueError, r"negative values, which have no mass"),
    (lambda: metrics.iou(MAPS, MASKS[..., :3]), ValueError, r"coarser than the \(4, 4\) maps"),
    (lambda: metrics.iou(MAPS, MASKS, threshold=1.0), ValueError, r"threshold is 1.0"),
    (lambda: metrics.accuracy(SCORES, LABELS[:2]), ValueError, r"scores have shape \(3, 2\), labels \(2,\)"),
    (lambda: metrics.accuracy(SCORES, LABELS + 1), ValueError, r"labels run from 1 to 2, but there are 2 columns"),
    (lambda: metrics.accuracy(SCORES, LABELS.float()), TypeError, r"labels have dtype torch.float32"),
    (lambda: metrics.accuracy(SCORES.int(), LABELS), TypeError, r"scores must be a floating-point tensor"),
    (lambda: metrics.accuracy(SCORES * float("nan"), LABELS), ValueError, r"scores hold NaN"),
    (lambda: metrics.worst_group_accuracy(LABELS, LABELS[:2]), ValueError, r"correct has shape \(3,\), groups \(2,\)"),
    (lambda: metrics.worst_group_accuracy(LABELS + 1, LABELS), ValueError, r"values outside 0..1"),
    (lambda: metrics.bootstrap_interval([]), ValueError, r"at least one image"),
    (lambda: metrics.bootstrap_interval([1.0], n=0), ValueError, r"n = 0"),
    (lambda: metrics.bootstrap_interval([1.0], level=95), ValueError, r"level = 95"),
])
def test_bad_input_names_the_remedy(call, error, match):
    with pytest.raises(error, match=match):
        call()
