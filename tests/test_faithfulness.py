"""Insertion and deletion: toys whose curve is known by hand, and an oracle that moves one pixel at a time."""

import math

import numpy as np
import pytest
import torch

from dealkit import metrics

SIZE, BAR = 8, (slice(None), slice(None), slice(0, 4), slice(2, 6))  # the bar: 16 of 64 pixels
CHANNELS = torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1)  # channels count differently: one that is left out shows


def toy():
    """Two images that are bright on the bar only, the map that knows it, and the score that reads it."""
    images = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.float64)
    images[BAR] = 1.0
    images[1] *= 3  # the second image's score is three times the first's

    def score(pictures, k):
        return (pictures * CHANNELS)[BAR].mean(dim=(1, 2, 3))

    return images, images[:, :1].clone(), score


def random_case(images=3, concepts=2, seed=0):
    """Images, coarse maps, and a non-linear score that differs for every concept, pixel, channel and image content."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.rand(images, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    maps = torch.rand(images, concepts, 4, 4, generator=generator, dtype=torch.float64)
    weights = torch.randn(concepts, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)

    def score(batch, k):
        return torch.tanh((batch * weights[k]).sum(dim=(1, 2, 3)) / 5) + 0.1 * (batch ** 2).mean(dim=(1, 2, 3))

    return pictures, maps, score


# --- the blur -------------------------------------------------------------------------------------

def test_blur_equals_a_gaussian_average_over_the_whole_image():
    image = torch.rand(1, 2, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = np.zeros((2, 6, 9))
    for y in range(6):
        for x in range(9):
            weight = np.array([[math.exp(-0.5 * (((y - i) / (0.2 * 6)) ** 2 + ((x - j) / (0.2 * 9)) ** 2))
                                for j in range(9)] for i in range(6)])
            expected[:, y, x] = (image[0].numpy() * weight).sum(axis=(1, 2)) / weight.sum()
    assert np.allclose(metrics.blur(image, share=0.2)[0], expected, atol=1e-12)


def test_blur_removes_what_is_as_small_as_a_part():
    image = torch.zeros(1, 3, 80, 80)
    image[..., 36:44, 36:44] = 1.0  # a part of 8 pixels
    assert metrics.blur(image).max() < 0.12
    assert torch.allclose(metrics.blur(torch.full((1, 3, 80, 80), 0.4)), torch.tensor(0.4))


def test_the_mean_baseline_is_each_images_own_colour():
    images = torch.stack([torch.zeros(3, 2, 2), torch.arange(12.0).view(3, 2, 2)])
    blank = metrics.without_content(images, "mean")
    assert blank.shape == images.shape and (blank[0] == 0).all()
    assert torch.equal(blank[1], torch.tensor([1.5, 5.5, 9.5]).view(3, 1, 1).expand(3, 2, 2))
    assert torch.equal(metrics.without_content(images), metrics.blur(images))


# --- curves known by hand -------------------------------------------------------------------------

def test_the_curve_of_an_oracle_map_by_hand():
    images, oracle, score = toy()
    whole = (0.5 + 1 + 2) / 3  # the bar at brightness 1, mean over channels
    curve = metrics.replacement_curve(score, torch.zeros_like(images), images, oracle, steps=8)
    # 8 of the bar's 16 pixels a step: half, all, and nothing more to come
    expected = torch.tensor([0, 0.5] + 7 * [1.0]).view(9, 1, 1) * torch.tensor([[whole], [3 * whole]])
    assert torch.allclose(curve, expected.double(), atol=1e-6)


def test_fidelity_of_the_oracle_is_one_and_of_its_opposite_the_last_step_only():
    images, oracle, score = toy()
    assert metrics.insertion_fidelity(score, images, oracle, steps=4) == pytest.approx(1.0)
    assert metrics.insertion_fidelity(score, images, -oracle, steps=4) == pytest.approx(1 / 4)
    both = metrics.insertion_fidelity(score, images, torch.cat([oracle, -oracle], dim=1), steps=4, reduction="none")
    assert both.tolist() == [pytest.approx([1.0, 0.25])] * 2


def test_insertion_and_deletion_areas_by_hand():
    images, oracle, score = toy()
    high, low = score(images, 0), score(metrics.blur(images), 0)
    # Four steps of 16 pixels. The oracle moves the whole bar in the first: one trapezoid of width 1/4, then flat.
    first, rest = (low + high) / 2 / 4, 3 / 4
    insertion = metrics.insertion_auc(score, images, oracle, steps=4, reduction="none")[:, 0]
    deletion = metrics.deletion_auc(score, images, oracle, steps=4, reduction="none")[:, 0]
    assert torch.allclose(insertion, first + rest * high) and torch.allclose(deletion, first + rest * low)
    # The opposite map moves the bar in the last step.
    assert torch.allclose(metrics.insertion_auc(score, images, -oracle, 4, "none")[:, 0], first + rest * low)
    assert metrics.deletion_auc(score, images, -oracle, 4) == pytest.approx((first + rest * high).mean().item())


@pytest.mark.parametrize("grid", [3, 4])      # neither divides 13: up-sampling leaves roundings on a constant map
@pytest.mark.parametrize("value", [0.0, 0.3, 1.9])
def test_equal_pixels_go_from_top_left_to_bottom_right(grid, value):
    seen = []
    start = torch.zeros(1, 3, 13, 13)
    metrics.replacement_curve(lambda x, k: (seen.append(x), x.mean(dim=(1, 2, 3)))[1], start, start + 1,
                              torch.full((1, 1, grid, grid), value), steps=13)
    assert all((batch[0, :, :step] == 1).all() and (batch[0, :, step:] == 0).all() for step, batch in enumerate(seen))
    assert len(seen) == 14


# --- against plain loops --------------------------------------------------------------------------

def curve_by_loops(score, start, end, maps, steps):
    """One image, one concept, one pixel at a time. Maps come at image resolution."""
    curve = np.zeros((steps + 1, len(start), maps.shape[1]))
    for b in range(len(start)):
        for k in range(maps.shape[1]):
            places = [(y, x) for y in range(SIZE) for x in range(SIZE)]
            places.sort(key=lambda place: -maps[b, k][place].item())
            picture = start[b].clone()
            for step in range(steps + 1):
                for y, x in places[:round(step * SIZE * SIZE / steps)]:
                    for channel in range(3):
                        picture[channel, y, x] = end[b, channel, y, x]
                curve[step, b, k] = score(picture[None], k).item()
    return curve


@pytest.mark.parametrize("steps, baseline", [(1, "blur"), (5, "blur"), (7, "blur"), (1, "mean"), (7, "mean")])
def test_all_metrics_equal_plain_loops_for_every_image_and_concept(steps, baseline):
    images, maps, score = random_case()
    fine = torch.nn.functional.interpolate(maps, size=(SIZE, SIZE), mode="bilinear")
    blank = metrics.blur(images)
    if baseline == "mean":
        for b in range(len(images)):
            for channel in range(3):
                blank[b, channel] = images[b, channel].sum() / SIZE ** 2
    inserted = curve_by_loops(score, blank, images, fine, steps)
    deleted = curve_by_loops(score, images, blank, fine, steps)
    fidelity = np.mean([np.clip(abs(s - inserted[0]) / abs(inserted[-1] - inserted[0]), 0, 1)
                        for s in inserted[1:]], axis=0)

    def area(curve):
        return sum((curve[t] + curve[t + 1]) / 2 / steps for t in range(steps))

    assert np.allclose(metrics.insertion_auc(score, images, maps, steps, "none", baseline), area(inserted))
    assert np.allclose(metrics.deletion_auc(score, images, maps, steps, "none", baseline), area(deleted))
    if baseline == "blur":
        assert np.allclose(metrics.insertion_fidelity(score, images, maps, steps, "none"), fidelity)
        assert metrics.insertion_fidelity(score, images, maps, steps) == pytest.approx(fidelity.mean())
        assert metrics.insertion_auc(score, images, maps, steps) == pytest.approx(area(inserted).mean())   # the default


def test_a_batch_gives_what_its_images_and_concepts_give_alone():
    images, maps, score = random_case(images=4, concepts=3)
    together = metrics.insertion_fidelity(score, images, maps, reduction="none")
    for b in range(4):
        for k in range(3):
            one_image, one_map = images[b:b + 1], maps[b:b + 1, k:k + 1]
            alone = metrics.insertion_fidelity(lambda batch, _: score(batch, k), one_image, one_map)
            assert together[b, k].item() == pytest.approx(alone)


# --- what the score gets to see -------------------------------------------------------------------

def test_every_step_moves_equal_portions_of_whole_pixels_and_the_last_is_the_image():
    images, maps, score = random_case()
    seen = {0: [], 1: []}

    def watch(batch, k):
        seen[k].append(batch)
        return score(batch, k)

    metrics.insertion_fidelity(watch, images, maps, steps=4)
    blurred = metrics.blur(images)
    for k in (0, 1):
        assert len(seen[k]) == 5 and torch.equal(seen[k][0], blurred) and torch.equal(seen[k][-1], images)
        for step, batch in enumerate(seen[k]):
            inserted = batch == images
            assert torch.equal(inserted.any(dim=1), inserted.all(dim=1))  # a pixel comes with all its channels
            assert inserted.all(dim=1).sum(dim=(1, 2)).tolist() == [step * 16] * 3
    assert seen[0][0] is seen[1][0] and seen[0][-1] is seen[1][-1]  # both ends can be encoded once for all concepts


def test_fidelity_lies_between_the_last_step_and_one():
    images, maps, score = random_case(images=20, concepts=3)
    values = metrics.insertion_fidelity(score, images, maps, reduction="none")
    assert (values >= 1 / 5).all() and (values <= 1).all() and values.std() > 0.01


def test_fidelity_is_undefined_where_the_blur_changes_nothing():
    images, oracle, score = toy()
    images[0] = 0.3  # a constant image is its own blur, up to rounding
    for dtype in (torch.float32, torch.float64):
        values = metrics.insertion_fidelity(score, images.to(dtype), oracle, steps=4, reduction="none")
        assert values.isnan().tolist() == [[True], [False]]
        assert metrics.insertion_fidelity(score, images.to(dtype), oracle, steps=4) == pytest.approx(1.0)


def test_inputs_stay_as_they_are_and_no_graph_is_kept():
    images, maps, score = random_case()
    before = images.clone(), maps.clone()
    maps.requires_grad_()
    assert not metrics.deletion_auc(score, images.requires_grad_(), maps, reduction="none").requires_grad
    assert torch.equal(images, before[0]) and torch.equal(maps, before[1])


# --- bad input ------------------------------------------------------------------------------------

IMAGES, MAPS, SCORE = random_case()


@pytest.mark.parametrize("call, error, match", [
    (lambda: metrics.insertion_fidelity(SCORE, IMAGES[:2], MAPS), ValueError, r"one row of maps per image"),
    (lambda: metrics.insertion_auc(SCORE, IMAGES[:, :, :3], MAPS), ValueError, r"\(4, 4\) are finer than the \(3, 8\)"),
    (lambda: metrics.replacement_curve(SCORE, IMAGES, IMAGES[:, :1], MAPS, 4), ValueError, r"nt \(3, 1, 8, 8\)"),
    (lambda: metrics.insertion_fidelity(SCORE, IMAGES, MAPS[0]), ValueError, r"expected 4 axes, \[B, K, h, w\]"),
    (lambda: metrics.insertion_fidelity(SCORE, IMAGES, MAPS * float("nan")), ValueError, r"maps hold NaN"),
    (lambda: metrics.insertion_fidelity(SCORE, IMAGES, MAPS, steps=0), ValueError, r"steps is 0; expected .* from 1"),
    (lambda: metrics.insertion_auc(SCORE, IMAGES, MAPS, steps=65), ValueError, r"steps is 65; .* 64 pixels"),
    (lambda: metrics.insertion_auc(SCORE, IMAGES, MAPS, steps=2.0), ValueError, r"steps is 2.0; expected a whole"),
    (lambda: metrics.insertion_auc(SCORE, IMAGES, MAPS, reduction="max"), ValueError, r"unknown reduction 'max'"),
    (lambda: metrics.deletion_auc(SCORE, IMAGES[0], MAPS), ValueError, r"expected \[B, C, H, W\]"),
    (lambda: metrics.deletion_auc(SCORE, IMAGES[:0], MAPS), ValueError, r"at least one image"),
    (lambda: metrics.deletion_auc(SCORE, IMAGES.byte(), MAPS), TypeError, r"images are torch.uint8; expected a float"),
    (lambda: metrics.deletion_auc(lambda x, k: 1.0, IMAGES, MAPS), ValueError, r"score\(images, 0\) gave float"),
    (lambda: metrics.deletion_auc(lambda x, k: x, IMAGES, MAPS), ValueError, r"floating point of shape \(3,\)"),
    (lambda: metrics.deletion_auc(lambda x, k: SCORE(x, k) / 0, IMAGES, MAPS), ValueError, r"is NaN or infinite"),
    (lambda: metrics.insertion_auc(SCORE, IMAGES, MAPS, baseline="black"), ValueError, r"'black'; .* 'blur', 'mean'"),
    (lambda: metrics.without_content(IMAGES.long(), "mean"), TypeError, r"images are torch.int64"),
    (lambda: metrics.blur(IMAGES, share=0), ValueError, r"share is 0; expected a positive share"),
    (lambda: metrics.blur(IMAGES.tolist()), TypeError, r"images are list"),
])
def test_bad_input_names_the_remedy(call, error, match):
    with pytest.raises(error, match=match):
        call()
