"""Min-max normalisation of maps: per map, idempotent, with finite gradients whatever the map."""

import doctest

import pytest
import torch

import dealkit.normalize
from dealkit.normalize import OVERLAPS, is_dead, normalize_maps, overlap_per_image


def test_the_examples_in_the_docstrings_run():
    result = doctest.testmod(dealkit.normalize)
    assert result.attempted > 0 and result.failed == 0


def test_normalize_by_hand_and_per_map():
    maps = torch.tensor([[[[2.0, 4.0], [3.0, 6.0]]], [[[-100.0, 0.0], [100.0, 0.0]]]])
    expected = torch.tensor([[[[0.0, 0.5], [0.25, 1.0]]], [[[0.0, 0.5], [1.0, 0.5]]]])
    assert torch.equal(normalize_maps(maps), expected)


def test_normalize_twice_changes_nothing():
    maps = normalize_maps(torch.rand(3, 4, 5, 6))
    assert torch.equal(normalize_maps(maps), maps)
    assert (maps.amin(dim=(2, 3)) == 0).all() and (maps.amax(dim=(2, 3)) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [0.0, 0.1, -7.0, 1e-30, 100.0])
def test_a_constant_map_becomes_zeros_with_a_zero_gradient(constant, dtype):
    maps = torch.full((1, 2, 3, 3), constant, dtype=dtype)
    maps[0, 1, 1, 1] += 1.0  # a live map beside it keeps its gradient
    maps.requires_grad_()
    normal = normalize_maps(maps)
    assert normal.dtype == dtype and torch.equal(normal[0, 0], torch.zeros(3, 3, dtype=dtype))
    (normal * torch.arange(9, dtype=dtype).view(3, 3)).sum().backward()
    assert torch.equal(maps.grad[0, 0], torch.zeros(3, 3, dtype=dtype))
    assert maps.grad[0, 1].isfinite().all() and maps.grad[0, 1].abs().sum() > 0
    assert is_dead(maps).tolist() == [[True, False]]


def test_rounding_noise_on_a_constant_map_is_not_stretched():
    noisy = torch.full((4, 4), 0.1)
    noisy[1, 2] = torch.nextafter(noisy[1, 2], torch.tensor(1.0))
    assert torch.equal(normalize_maps(noisy), torch.zeros(4, 4)) and is_dead(noisy)


def test_faint_maps_are_stretched_and_overflow_is_not_hidden():
    faint = torch.tensor([[0.0, 1e-20], [5e-21, 0.0]])
    assert torch.allclose(normalize_maps(faint), torch.tensor([[0.0, 1.0], [0.5, 0.0]]))
    for broken in (float("nan"), float("inf")):
        assert normalize_maps(torch.tensor([[0.0, 1.0], [broken, 0.0]])).isnan().any()
        assert normalize_maps(torch.full((2, 2), broken)).isnan().all()


def test_normalize_gradient_by_finite_differences():
    maps = torch.rand(2, 2, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(normalize_maps, maps)
    assert torch.autograd.gradgradcheck(normalize_maps, maps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", OVERLAPS)
def test_constant_maps_overlap_with_nothing_and_leave_the_gradient_of_others_alone(kind, dtype):
    """Two pairs with a constant map, one of constant maps only, and one pair of live maps, which keeps its gradient."""
    live = torch.tensor([[[0.0, 1.0], [2.0, 4.0]], [[4.0, 1.0], [0.0, 3.0]]], dtype=dtype)
    constant = torch.stack([torch.zeros(2, 2), torch.full((2, 2), 0.3)]).to(dtype)
    maps = torch.stack([torch.cat([live[:1], constant]), torch.cat([constant, constant[:1]]),
                        torch.cat([constant[:1], live])]).requires_grad_()
    values = overlap_per_image(maps, kind)
    assert values[:2].tolist() == [0.0, 0.0] and values[2] > 0
    values.sum().backward()
    assert maps.grad.isfinite().all() and (maps.grad[1] == 0).all() and (maps.grad[2, 0] == 0).all()
    assert (maps.grad[2, 1:].flatten(1).abs().sum(dim=1) > 0).all()


def test_soft_iou_by_hand_for_each_image():
    one = [[0.0, 1.0], [0.5, 0.25]]
    other = [[1.0, 0.0], [0.5, 0.75]]                                    # min 0, 0, .5, .25; max 1, 1, .5, .75
    apart = [[1.0, 0.0], [0.0, 0.0]]
    maps = torch.tensor([[one, other], [one, one], [one, apart]], dtype=torch.float64)
    assert overlap_per_image(maps, "soft_iou").tolist() == pytest.approx([0.75 / 3.25, 1.0, 0.0])
    three = torch.tensor([[one, other, apart]], dtype=torch.float64)     # other and apart: 1 / 2.25
    assert overlap_per_image(three, "soft_iou").item() == pytest.approx((0.75 / 3.25 + 0.0 + 1 / 2.25) / 3)


@pytest.mark.parametrize("maps, error, match", [
    ([[1.0, 2.0]], TypeError, r"maps is a list; expected a torch tensor"),
    (torch.ones(3, 3, dtype=torch.long), TypeError, r"dtype torch.int64; expected floating point"),
    (torch.ones(3), ValueError, r"\(3,\); expected \[..., h, w\]"),
    (torch.ones(2, 0, 3), ValueError, r"at least one pixel"),
])
def test_bad_input_names_the_remedy(maps, error, match):
    with pytest.raises(error, match=match):
        normalize_maps(maps)
