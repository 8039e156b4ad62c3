"""IoU at the best threshold, hits on points, rank correlation: by hand, against loops and scipy, and at their bounds.

Also ties, dead maps, and the trick that the paper's score falls for, and the metrics here do not.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from dealkit import metrics
from dealkit.datasets import Birdworld


def random_case(batch=6, concepts=3, grid=5, size=20, seed=0):
    """Random maps and masks of a rectangle each."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(batch, concepts, grid, grid, generator=generator, dtype=torch.float64)
    masks = torch.zeros(batch, concepts, size, size, dtype=torch.bool)
    for mask in masks.flatten(0, 1):
        y, x, height, width = torch.randint(2, size // 2, (4,), generator=generator).tolist()
        mask[y:y + height, x:x + width] = True
    return maps, masks


# --- IoU at the best threshold --------------------------------------------------------------------

def test_best_iou_equals_a_search_over_all_thresholds():
    maps, masks = random_case()
    fine = F.interpolate(maps, size=masks.shape[-2:], mode="bilinear")
    values = metrics.best_iou(maps, masks, reduction="none")
    for b in range(6):
        for k in range(3):
            one, mask = fine[b, k].numpy(), masks[b, k].numpy()
            best = max(((one >= t) & mask).sum() / ((one >= t) | mask).sum() for t in np.unique(one))
            assert values[b, k].item() == pytest.approx(best)
    assert metrics.best_iou(maps, masks) == pytest.approx(values.mean().item())


def test_no_fixed_threshold_is_better_and_the_whole_image_is_the_floor():
    maps, masks = random_case(seed=1)
    best = metrics.best_iou(maps, masks, reduction="none")
    assert (best >= masks.double().mean(dim=(2, 3)) - 1e-6).all() and (best <= 1).all()
    for threshold in np.linspace(0, .99, 25):
        assert (best >= metrics.iou(maps, masks, threshold, reduction="none") - 1e-6).all()


def test_best_iou_at_its_bounds():
    maps, masks = random_case()
    area = masks.float().mean(dim=(2, 3))
    assert metrics.best_iou(masks.float(), masks) == 1
    assert torch.allclose(metrics.best_iou((~masks).float(), masks, reduction="none"), area)    # all of the image
    assert torch.allclose(metrics.best_iou(torch.full_like(maps, .3).float(), masks, reduction="none"), area)
    assert metrics.best_iou(torch.zeros_like(maps), masks) == 0
    for scale in (1e-25, 1e25):
        assert metrics.best_iou(maps.float() * scale, masks) == pytest.approx(metrics.best_iou(maps, masks), rel=1e-4)


def test_equal_values_are_claimed_together():
    maps = torch.tensor([[[[1., 1.], [.5, 0.]]]])
    corner = torch.tensor([[[[True, False], [False, False]]]])
    assert metrics.best_iou(maps, corner) == .5              # no threshold takes one of two equal pixels
    maps[..., 0, 1] += 2 ** -23                              # a rounding apart is not apart
    assert metrics.best_iou(maps, corner) == .5 == metrics.best_iou(maps.flip(3), corner.flip(3))
    maps[..., 0, 1] -= .01
    assert metrics.best_iou(maps, corner) == 1


def test_where_the_mask_is_empty_there_is_no_iou():
    maps, masks = random_case(batch=2, concepts=2)
    masks[1, 0] = False
    assert metrics.best_iou(maps, masks, reduction="none").isnan().tolist() == [[False, False], [True, False]]


# --- ties and dead maps ---------------------------------------------------------------------------

def test_up_sampling_makes_no_peak_out_of_the_roundings_of_a_dead_map():
    """A factor that is not whole leaves roundings where the map is constant, or constant but for roundings."""
    noise = torch.randint(0, 9, (200, 1, 4, 4), generator=torch.Generator().manual_seed(0)) * 2.0 ** -23
    maps = torch.cat([torch.full((1, 1, 4, 4), 0.3), (1.9 + noise)])
    maps = maps[metrics.dead_maps(maps, reduction="none")[:, 0] == 1]
    masks = torch.zeros(len(maps), 1, 13, 13, dtype=torch.bool)
    masks[..., :7] = True
    assert len(maps) > 50
    for metric, expected in ((metrics.pointing_game, 0), (metrics.iou, 0), (metrics.best_iou, 7 / 13)):
        assert metric(maps, masks, reduction="none").flatten().tolist() == pytest.approx([expected] * len(maps))


def test_a_pixel_at_the_threshold_is_not_claimed():
    maps = torch.tensor([[[[1.0, 0.5], [0.0, 0.0]]]])
    assert metrics.iou(maps, maps == 1) == 1 and metrics.iou(maps, maps == 1, threshold=0.49) == 0.5


# --- points ---------------------------------------------------------------------------------------

def test_a_disc_has_the_pixels_within_its_radius():
    points = torch.tensor([[[3.0, 4.5], [0.0, 0.0]], [[7.9, 5.9], [math.nan, math.nan]]])
    discs = metrics.point_masks(points, (6, 8), radius=.25)                     # 2 pixels
    for b in range(2):
        for k in range(2):
            x, y = points[b, k].tolist()
            expected = [[math.dist((column + .5, row + .5), (x, y)) <= 2 for column in range(8)] for row in range(6)]
            assert discs[b, k].tolist() == expected
    assert discs[1, 1].sum() == 0 < discs[1, 0].sum() < discs[0, 0].sum() == 12


def test_the_peak_must_lie_within_the_radius():
    maps = torch.zeros(1, 1, 8, 8)
    maps[..., 2, 5] = 1                                      # at 64 pixels: the four about (x, y) = (44, 20)
    hits = [metrics.point_hits(maps, torch.tensor([[[44. + distance, 20.]]]), (64, 64), radius=.1)
            for distance in (0, 5, 6.4, 7.5)]
    assert hits == [1, 1, .5, 0]                             # 6.4 pixels: half of the peak lies within
    assert metrics.point_hits(maps, torch.tensor([[[20., 44.]]]), (64, 64)) == 0    # x is the column


def test_points_at_their_bounds():
    points = torch.tensor([[[30., 40.], [math.nan, math.nan], [200., 40.]]]).expand(4, 3, 2)
    oracle = torch.zeros(4, 3, 64, 64)
    oracle[:, :, 39:41, 29:31] = 1
    for metric in (metrics.point_hits, metrics.point_mass):
        values = metric(oracle, points, (64, 64), reduction="none")
        assert (values[:, 0] == 1).all() and values[:, 1:].isnan().all()        # not visible, and outside of the image
        assert metric(oracle, points, (64, 64)) == 1
    share = metrics.point_mass(torch.ones(4, 3, 8, 8), points, (64, 64))
    assert share == pytest.approx(math.pi * .1 ** 2, rel=.05)
    assert metrics.point_hits(torch.ones(4, 3, 8, 8), points, (64, 64)) == 0    # a dead map points nowhere


# --- the trick ------------------------------------------------------------------------------------

def test_five_single_pixels_reach_the_best_disentanglability_and_miss_the_parts():
    """Every cell of the grid has its turn, so that the shares are those of a place drawn at random."""
    masks = Birdworld("test", n=32).batch(range(32))["part_masks"]
    honest = F.adaptive_avg_pool2d(masks.float(), 10)        # the truth, as well as the grid can say it
    best, area = 1 / (1 + math.exp(-2)), masks.float().mean().item()
    scores = {"pointing_game": [], "mass_in_mask": [], "iou": []}
    for cells in torch.randperm(100, generator=torch.Generator().manual_seed(0)).view(20, 5):
        gamed = F.one_hot(cells, 100).float().view(1, 5, 10, 10).expand(32, -1, -1, -1)
        assert metrics.disentanglability(gamed) == pytest.approx(best) and metrics.overlap(gamed) == 0
        assert metrics.dead_maps(gamed) == 0                 # and they are not dead
        for name, values in scores.items():
            values.append(getattr(metrics, name)(gamed, masks))
    assert metrics.disentanglability(honest) < best - .01    # the truth scores worse: parts touch
    for name, values in scores.items():
        assert np.mean(values) < 1.3 * area < .05, name
        assert getattr(metrics, name)(honest, masks) > 8 * area, name


# --- rank correlation -----------------------------------------------------------------------------

def test_rank_correlation_equals_scipy_ties_included():
    maps = random_case()[0].mul(6).round()
    others = random_case(seed=5)[0].relu().mul(4).round()
    values = metrics.rank_correlation(maps, others, reduction="none")
    for b in range(6):
        for k in range(3):
            assert values[b, k].item() == pytest.approx(spearmanr(maps[b, k].flatten(), others[b, k].flatten())[0])
    assert metrics.rank_correlation(maps, maps) == pytest.approx(1)
    assert metrics.rank_correlation(maps, -maps ** 3) == pytest.approx(-1)


def test_a_dead_map_has_no_order():
    maps = random_case()[0]
    others = maps.clone()
    others[0, 0], others[1, 1] = 0, .7
    undefined = metrics.rank_correlation(others, maps, reduction="none").isnan()
    assert undefined.nonzero().tolist() == [[0, 0], [1, 1]]
    assert metrics.rank_correlation(maps, others) == pytest.approx(1)            # left out of the mean


# --- bad input ------------------------------------------------------------------------------------

MAPS, MASKS = random_case(batch=2)
POINTS = torch.rand(2, 3, 2) * 20
HALF = torch.where(torch.tensor([True, False]), POINTS, math.nan)


@pytest.mark.parametrize("call, error, match", [
    (lambda: metrics.best_iou(MAPS, MASKS.float()), TypeError, r"masks are torch.float32; expected a bool"),
    (lambda: metrics.best_iou(MAPS * math.nan, MASKS), ValueError, r"maps hold NaN"),
    (lambda: metrics.best_iou(MAPS, MASKS, reduction="max"), ValueError, r"unknown reduction 'max'"),
    (lambda: metrics.point_hits(MAPS, POINTS.long(), (20, 20)), TypeError, r"points are torch.int64; .* \.float\(\)"),
    (lambda: metrics.point_hits(MAPS, POINTS.tolist(), (20, 20)), TypeError, r"points are list"),
    (lambda: metrics.point_hits(MAPS, POINTS[0], (20, 20)), ValueError, r"\(3, 2\); expected \[B, K, 2\]"),
    (lambda: metrics.point_mass(MAPS, POINTS[:, :2], (20, 20)), ValueError, r"B, K = \(2, 3\) as in the maps"),
    (lambda: metrics.point_mass(MAPS, HALF, (20, 20)), ValueError, r"NaN for only one of x and y"),
    (lambda: metrics.point_masks(POINTS, (20, 20), radius=.04), ValueError, r"radius is 0.04, 0.80 pixels"),
    (lambda: metrics.rank_correlation(MAPS, MAPS[:1]), ValueError, r"\(2, 3, 5, 5\) and \(1, 3, 5, 5\)"),
    (lambda: metrics.rank_correlation(MAPS, MAPS[0]), ValueError, r"expected 4 axes"),
])
def test_bad_input_names_the_remedy(call, error, match):
    with pytest.raises(error, match=match):
        call()
