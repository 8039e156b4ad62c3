"""Infidelity and max-sensitivity: against plain loops, by hand, at their bounds, and what score and explain see."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dealkit import metrics

SIZE, GRID = 12, (4, 3)


def random_case(images=3, concepts=2, seed=0):
    """Images, maps, and a non-linear score that differs for every concept and pixel."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.rand(images, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    maps = torch.rand(images, concepts, *GRID, generator=generator, dtype=torch.float64)
    weights = torch.randn(concepts, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)

    def score(batch, k):
        return torch.tanh((batch * weights[k]).sum(dim=(1, 2, 3)) / 5)

    return pictures, maps, score


def random_cells(n=5, seed=3):
    return torch.rand(n, *GRID, generator=torch.Generator().manual_seed(seed)) < .3


def linear_case():
    """A score that adds up weighted pixels, and the map that knows what every cell adds to it."""
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(2, SIZE, SIZE, generator=generator, dtype=torch.float64)
    images = torch.rand(2, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    blank = metrics.without_content(images, "mean")
    share = ((images - blank)[:, None] * weights[:, None]).sum(dim=2)                      # [B, K, H, W]
    maps = share.unflatten(3, (3, 4)).unflatten(2, (4, 3)).sum(dim=(3, 5))                 # [B, K, 4, 3]
    return images, maps, lambda x, k: (x * weights[k]).sum(dim=(1, 2, 3))


# --- infidelity -----------------------------------------------------------------------------------

@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("baseline", ["blur", "mean"])
def test_infidelity_equals_plain_loops(baseline, normalize):
    images, maps, score = random_case()
    removed, blank = random_cells(), metrics.without_content(images, baseline)
    values = metrics.infidelity(score, images, maps, removed=removed, baseline=baseline, normalize=normalize,
                                reduction="none")
    for b in range(3):
        for k in range(2):
            said, dropped = [], []
            for cells in removed:
                changed = images[b].clone()
                for y in range(SIZE):
                    for x in range(SIZE):
                        if cells[y * 4 // SIZE, x * 3 // SIZE]:
                            changed[:, y, x] = blank[b, :, y, x]
                said.append(maps[b, k][cells].sum().item())
                dropped.append((score(images[b:b + 1], k) - score(changed[None], k)).item())
            said, dropped = np.array(said), np.array(dropped)
            scale = np.linalg.lstsq(said[:, None], dropped, rcond=None)[0][0] if normalize else 1
            assert values[b, k].item() == pytest.approx(np.mean((scale * said - dropped) ** 2))
    assert metrics.infidelity(score, images, maps, removed=removed, baseline=baseline, normalize=normalize) == \
        pytest.approx(values.mean().item())


def test_a_map_that_knows_every_drop_has_no_infidelity():
    images, maps, score = linear_case()
    exact = {"baseline": "mean", "normalize": False, "reduction": "none"}
    assert torch.allclose(metrics.infidelity(score, images, maps, **exact), torch.zeros(2, 2, dtype=torch.float64))
    assert (metrics.infidelity(score, images, 7 * maps, **exact) > .1).all()
    for scale in (7, -1e-30):       # a factor, even the wrong sign, is forgiven; another map is not
        assert metrics.infidelity(score, images, scale * maps, baseline="mean") == pytest.approx(0, abs=1e-9)
    assert metrics.infidelity(score, images, maps.flip(0), baseline="mean") > .1


def test_a_zero_map_has_the_mean_square_of_the_drops():
    images, maps, score = random_case()
    removed = random_cells()
    least = metrics.infidelity(score, images, maps, removed=removed, reduction="none")
    zero = metrics.infidelity(score, images, 0 * maps, removed=removed, reduction="none")
    assert (least < zero).all()
    assert torch.allclose(zero, metrics.infidelity(score, images, 0 * maps, removed=removed, normalize=False,
                                                   reduction="none"))


def test_the_score_sees_squares_of_whole_cells_and_one_tensor_for_all_concepts():
    images, maps, score = random_case()
    seen = {0: [], 1: []}

    def watch(batch, k):
        seen[k].append(batch)
        return score(batch, k)

    metrics.infidelity(watch, images, maps, n=40)
    assert len(seen[0]) == 41 and all(a is b for a, b in zip(seen[0], seen[1]))
    places = set()
    for batch in seen[0]:
        gone = (batch != images).all(dim=1)
        assert torch.equal(gone, (batch != images).any(dim=1)) and (gone == gone[0]).all()      # the same for all
        cells = gone[0].view(4, 3, 3, 4).permute(0, 2, 1, 3).flatten(2).float().mean(dim=2)
        assert ((cells == 0) | (cells == 1)).all()
        rows, columns = cells.any(dim=1).sum().item(), cells.any(dim=0).sum().item()
        assert cells.sum() == rows * columns and rows == columns <= 1                           # half of 3 cells is 1
        places.add(cells.argmax().item())
    assert len(places) == 12                                                                    # everywhere
    big = torch.rand(3, 2, 12, 12, dtype=torch.float64)
    seen[0].clear()
    metrics.infidelity(watch, images, big, n=60)
    sides = {round((batch != images).any(dim=1)[0].sum().item() ** .5, 6) for batch in seen[0]}
    assert sides == {0, 1, 2, 3, 4, 5, 6}


def test_a_pixel_belongs_to_the_cell_that_holds_its_centre():
    """Where the grid does not divide the image: 5 cells of 2.4 pixels."""
    images, _, score = random_case()
    seen, removed = [], torch.eye(5, dtype=torch.bool)[:, None].expand(5, 5, 5)                     # column by column
    metrics.infidelity(lambda x, k: (seen.append(x), score(x, k))[1], images, torch.rand(3, 1, 5, 5), removed=removed)
    gone = [(batch != images).any(dim=1)[0].all(dim=0).tolist() for batch in seen if not torch.equal(batch, images)]
    assert gone == [[int((x + .5) / 2.4) == column for x in range(SIZE)] for column in range(5)]


def test_infidelity_depends_on_the_seed_and_not_on_the_batch():
    images, maps, score = random_case()
    values = metrics.infidelity(score, images, maps, reduction="none")
    assert torch.equal(values, metrics.infidelity(score, images, maps, reduction="none"))
    assert not torch.allclose(values, metrics.infidelity(score, images, maps, seed=1, reduction="none"))
    alone = metrics.infidelity(score, images[1:2], maps[1:2], reduction="none")
    assert torch.allclose(alone, values[1:2])


# --- max-sensitivity ------------------------------------------------------------------------------

def test_max_sensitivity_equals_plain_loops_on_what_explain_was_shown():
    images, _, _ = random_case()
    seen = []

    def explain(batch):
        seen.append(batch)
        return torch.stack([(batch ** 2).mean(dim=1), batch[:, 0].exp()], dim=1)

    values = metrics.max_sensitivity(explain, images, radius=.1, n=5, reduction="none")
    assert len(seen) == 6 and torch.equal(seen[0], images)
    for b in range(3):
        for k in range(2):
            maps = [explain(batch)[b, k].numpy() for batch in seen[:6]]
            expected = max(np.linalg.norm(one - maps[0]) for one in maps[1:]) / np.linalg.norm(maps[0])
            assert values[b, k].item() == pytest.approx(expected)
    noise = torch.stack(seen[1:6]) - images
    assert torch.allclose(noise, noise[:, :1])                                  # the same for every image
    assert .099 < noise.abs().max() <= .1 + 1e-6 and noise.mean().abs() < .01
    assert not torch.allclose(noise[0], noise[1])


def test_max_sensitivity_by_hand():
    images = torch.ones(1, 1, 2, 2)
    maps = iter(torch.tensor([[3., 4.], [3., 4.5], [3., 4.], [1.5, 2.]]).view(4, 1, 1, 1, 2))
    assert metrics.max_sensitivity(lambda x: next(maps), images, n=3) == pytest.approx(.5)      # |(1.5, 2)| / 5


def test_max_sensitivity_at_its_bounds():
    images, maps, _ = random_case()
    assert metrics.max_sensitivity(lambda x: maps, images) == 0
    grey = lambda x: x.mean(dim=1, keepdim=True)  # noqa: E731
    value = metrics.max_sensitivity(grey, images)
    assert 0 < value < metrics.max_sensitivity(grey, images, radius=.2)
    assert value <= metrics.max_sensitivity(grey, images, n=30)
    assert value == pytest.approx(metrics.max_sensitivity(lambda x: grey(x) * 1e-30, images))
    assert value != metrics.max_sensitivity(grey, images, seed=1)
    alone = metrics.max_sensitivity(grey, images[2:], reduction="none")
    assert torch.allclose(alone, metrics.max_sensitivity(grey, images, reduction="none")[2:])


def test_a_map_that_is_zero_has_nothing_to_be_compared_with():
    images, maps, _ = random_case()
    maps[1, 0] = 0
    values = metrics.max_sensitivity(lambda x: maps + (x is not images), images, reduction="none")
    assert values.isnan().nonzero().tolist() == [[1, 0]]
    assert math.isnan(metrics.max_sensitivity(lambda x: 0 * maps, images))


# --- bad input ------------------------------------------------------------------------------------

IMAGES, MAPS, SCORE = random_case()


@pytest.mark.parametrize("call, error, match", [
    (lambda: metrics.infidelity(SCORE, IMAGES[:2], MAPS), ValueError, r"2 images and maps of 3; expected one row"),
    (lambda: metrics.infidelity(SCORE, IMAGES[..., :2], MAPS), ValueError, r"\(4, 3\) are finer than the \(12, 2\)"),
    (lambda: metrics.infidelity(SCORE, IMAGES, MAPS * math.nan), ValueError, r"maps hold NaN"),
    (lambda: metrics.infidelity(SCORE, IMAGES, MAPS, n=0), ValueError, r"n = 0; expected at least one square"),
    (lambda: metrics.infidelity(SCORE, IMAGES, MAPS, baseline="black"), ValueError, r"unknown baseline 'black'"),
    (lambda: metrics.infidelity(SCORE, IMAGES, MAPS, removed=random_cells().float()), ValueError, r"float32 \(5, 4"),
    (lambda: metrics.infidelity(SCORE, IMAGES, MAPS, removed=random_cells().mT), ValueError, r"grid \(4, 3\)"),
    (lambda: metrics.infidelity(lambda x, k: x, IMAGES, MAPS), ValueError, r"floating point of shape \(3,\)"),
    (lambda: metrics.max_sensitivity(lambda x: MAPS, IMAGES, n=0), ValueError, r"n = 0, .*expected n >= 1"),
    (lambda: metrics.max_sensitivity(lambda x: MAPS, IMAGES, radius=0), ValueError, r"radius = 0; .*positive radius"),
    (lambda: metrics.max_sensitivity(lambda x: MAPS, IMAGES.byte()), TypeError, r"images are torch.uint8; expected"),
    (lambda: metrics.max_sensitivity(lambda x: MAPS, IMAGES[0]), ValueError, r"expected \[B, C, H, W\]"),
    (lambda: metrics.max_sensitivity(lambda x: MAPS[:2], IMAGES), ValueError, r"\(2, 2, 4, 3\) for 3 images"),
    (lambda: metrics.max_sensitivity(lambda x: MAPS[0], IMAGES), ValueError, r"expected 4 axes"),
])
def test_bad_input_names_the_remedy(call, error, match):
    with pytest.raises(error, match=match):
        call()
