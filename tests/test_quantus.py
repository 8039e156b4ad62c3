"""Quantus 0.6 as an oracle: other people's code for the same measures, wherever its definition and ours can meet.

It takes one map per image at the image's resolution, as numpy arrays; our pairs of an image and a concept become its
images. It is a test dependency only.
"""

from __future__ import annotations

import sys
import types
from importlib import import_module

import numpy as np
import pytest
import torch

from dealkit import metrics

try:
    import_module("cv2")
except ImportError:
    # Quantus imports OpenCV, which wants the libGL.so.1 that a machine without a screen may lack. Only functions that
    # turn or shift an image call it (quantus/functions/perturb_func.py), and no metric below does either: an empty
    # module will do, and it goes again, so that nobody else takes it for OpenCV.
    sys.modules["cv2"] = types.ModuleType("cv2")
    import quantus
    del sys.modules["cv2"]
else:
    import quantus
from quantus.functions.similarity_func import correlation_spearman  # noqa: E402

QUIET = {"abs": False, "normalise": False, "disable_warnings": True, "display_progressbar": False}


def random_case(images=4, concepts=2, size=8, seed=0):
    """Maps at the resolution of their masks, all values different, so that no up-sampling and no tie plays a part."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.stack([torch.randperm(size * size, generator=generator).view(size, size) + 1.
                        for _ in range(images * concepts)]).view(images, concepts, size, size).double()
    masks = torch.zeros(images, concepts, size, size, dtype=torch.bool)
    for mask in masks.flatten(0, 1):
        y, x, height, width = torch.randint(2, size // 2 + 1, (4,), generator=generator).tolist()
        mask[y:y + height, x:x + width] = True
    return maps, masks


def localise(metric, maps, masks) -> torch.Tensor:
    """A localization metric of Quantus for every pair, `[B, K]`."""
    maps, masks = (values.flatten(0, 1)[:, None].numpy() for values in (maps, masks))
    scores = metric(model=None, x_batch=maps, y_batch=np.zeros(len(maps), int), a_batch=maps, s_batch=masks)
    return torch.tensor(np.array(scores, dtype=float)).view(4, 2)


class Scores(torch.nn.Module):
    """A non-linear score for each of K concepts, as a classifier, in float64."""

    def __init__(self, channels, size, concepts=2, seed=1):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = torch.nn.Parameter(torch.randn(concepts, channels, size, size, generator=generator).double())

    def forward(self, images):
        images = torch.as_tensor(images).double()
        return torch.tanh(torch.einsum("bchw,kchw->bk", images, self.weights) / 5)

    def of(self, images, k):
        with torch.no_grad():
            return self(images)[:, k]


def centred(channels, size=8, images=4, seed=2):
    """Images whose mean colour is 0, so that Quantus's black is our mean."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(images, channels, size, size, generator=generator).double()
    return pictures - pictures.mean(dim=(2, 3), keepdim=True)


# --- localization ---------------------------------------------------------------------------------

def test_pointing_game_and_mass():
    maps, masks = random_case()
    maps[0, 0] += 100 * masks[0, 0]                                     # at least one hit
    pointing = localise(quantus.PointingGame(**QUIET), maps, masks)
    assert torch.equal(metrics.pointing_game(maps, masks, reduction="none").double(), pointing)
    assert 0 < pointing.mean() < 1
    mass = localise(quantus.RelevanceMassAccuracy(**QUIET), maps, masks)
    assert torch.allclose(metrics.mass_in_mask(maps, masks, reduction="none"), mass)


def test_best_iou_from_top_k_intersections():
    """Quantus's share of the mask in the k highest pixels, for every k, holds the IoU at every threshold."""
    maps, masks = random_case(seed=3)
    area = masks.sum(dim=(2, 3))
    hits = [k * localise(quantus.TopKIntersection(k=k, **QUIET), maps, masks) for k in range(1, 64)]
    ious = torch.stack([inside / (k + area - inside) for k, inside in enumerate([*hits, area], start=1)])
    assert torch.allclose(metrics.best_iou(maps, masks, reduction="none").double(), ious.amax(dim=0))
    at = (maps.flatten(2).argsort(dim=-1).argsort(dim=-1) >= 40).view_as(maps)          # and at one fixed threshold
    threshold = 39.5 / 63
    assert torch.equal(at, (maps - 1) / 63 > threshold)
    assert torch.allclose(metrics.iou(maps, masks, threshold, reduction="none").double(), ious[23])


# --- faithfulness ---------------------------------------------------------------------------------

def test_deletion_of_single_pixels():
    """PixelFlipping, on images of one channel; its curve leaves the whole image out."""
    images, model = centred(channels=1), Scores(1, 8).eval()
    maps = random_case()[0]
    ours = metrics.deletion_auc(model.of, images, maps, steps=16, reduction="none", baseline="mean")
    for k in range(2):
        curves = quantus.PixelFlipping(features_in_step=4, perturb_baseline=0., **QUIET)(
            model=model, x_batch=images.numpy(), y_batch=np.full(4, k), a_batch=maps[:, k:k + 1].numpy(),
            softmax=False)
        curves = np.concatenate([model.of(images, k)[:, None].numpy(), np.array(curves)], axis=1)
        assert ours[:, k].numpy() == pytest.approx(np.trapezoid(curves, dx=1 / 16, axis=1), rel=1e-5)


def test_deletion_of_patches_with_all_their_channels():
    """Selectivity deletes a patch at a time: our order for a map that is constant on patches."""
    images, model = centred(channels=3), Scores(3, 8).eval()
    maps = random_case(size=4)[0].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    curve = metrics.replacement_curve(model.of, images, metrics.without_content(images, "mean"), maps, steps=16)
    for k in range(2):
        deleted = quantus.Selectivity(patch_size=2, perturb_baseline=0., **QUIET)(
            model=model, x_batch=images.numpy(), y_batch=np.full(4, k), a_batch=maps[:, k:k + 1].numpy(),
            softmax=False)
        assert curve[1:, :, k].T.numpy() == pytest.approx(np.array(deleted), rel=1e-5, abs=1e-6)     # float32
    assert curve.std(dim=0).min() > .01


def test_infidelity():
    """Quantus blacks out patches one after the other and leaves them black; we are told to remove the same cells.

    It multiplies its map by the change of the pixels, we sum ours over the cells: on pixels of -1 and 1 that are
    replaced by 0, its map is ours times the image.
    """
    images = torch.ones(4, 1, 8, 8, dtype=torch.float64)
    images[:, :, (torch.arange(8)[:, None] + torch.arange(8)) % 2 == 0] = -1
    model, maps = Scores(1, 8).eval(), random_case()[0] / 200
    places = torch.arange(64).view(4, 2, 4, 2).permute(0, 2, 1, 3).reshape(16, 4)       # the pixels of 16 patches
    removed = torch.stack([torch.isin(torch.arange(64), places[:n]).view(8, 8) for n in range(1, 17)])
    ours = metrics.infidelity(model.of, images, maps, removed=removed, baseline="mean", normalize=False,
                              reduction="none")
    for k in range(2):
        theirs = quantus.Infidelity(perturb_patch_sizes=[2], n_perturb_samples=1, perturb_baseline=0., **QUIET)(
            model=model, x_batch=images.numpy(), y_batch=np.full(4, k),
            a_batch=(maps[:, k:k + 1] * images).numpy(), softmax=False)
        assert ours[:, k].numpy() == pytest.approx(np.array(theirs), rel=1e-5)
    assert ours.min() > .01


def test_max_sensitivity():
    """With the noise that we drew, recorded on its way into `explain`."""
    images, model, seen = centred(channels=3), Scores(3, 8), []

    def explain(batch):
        seen.append(batch)
        return torch.stack([(batch * weight).sum(dim=1).square() for weight in model.weights.detach()], dim=1)

    ours = metrics.max_sensitivity(explain, images, radius=.1, n=5, reduction="none")
    for k in range(2):
        noise = iter([(batch - images).flatten(1).numpy() for batch in seen[1:6]])
        theirs = quantus.MaxSensitivity(nr_samples=5, perturb_func=lambda arr, **_: arr + next(noise),  # noqa: B023
                                        **QUIET)(
            model=model.eval(), x_batch=images.numpy(), y_batch=np.full(4, k), a_batch=None,
            explain_func=lambda inputs, **_: explain(torch.as_tensor(inputs))[:, k:k + 1].numpy())  # noqa: B023
        assert ours[:, k].numpy() == pytest.approx(np.array(theirs), rel=1e-5)
    assert ours.min() > .01


# --- similarity -----------------------------------------------------------------------------------

def test_rank_correlation():
    maps, others = random_case()[0], (random_case(seed=9)[0] / 8).round()               # ties
    theirs = correlation_spearman(maps.flatten(0, 1).flatten(1).numpy(), others.flatten(0, 1).flatten(1).numpy(),
                                  batched=True)
    assert metrics.rank_correlation(maps, others, reduction="none").flatten().numpy() == pytest.approx(theirs)
