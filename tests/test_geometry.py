"""Part points through transforms: a dot is drawn, the picture transformed for real, and the dot looked for."""
from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision.transforms as v1
from conftest import tiny_vit
from open_clip.transform import AugmentationCfg, PreprocessCfg, ResizeKeepRatio, image_transform_v2
from torchvision.transforms import v2

from dealkit.datasets.geometry import view_of


def preprocess(size, mode="shortest", **options):
    return image_transform_v2(PreprocessCfg(size=size, resize_mode=mode, **options), is_train=False)


TRANSFORMS = {
    "as CLIP": preprocess(64), "longest": preprocess(64, "longest"), "squash": preprocess((48, 80), "squash"),
    "oblong": preprocess((48, 80)), "oblong, longest": preprocess((80, 48), "longest"),
    "bilinear": preprocess(56, interpolation="bilinear"), "of a model": tiny_vit().preprocess,
    "resize only": v1.Compose([v1.Resize(60), v1.ToTensor()]), "a tensor only": v1.ToTensor(),
    "max_size": v1.Compose([v1.Resize(60, max_size=70), v1.ToTensor()]),
    "crop only": v1.Compose([v1.CenterCrop((101, 64)), v1.ToTensor()]),
    "larger than the picture": v1.Compose([v1.CenterCrop((231, 170)), v1.ToTensor()]),
    "nested": v1.Compose([v1.Compose([v1.Resize([70])]), v1.Grayscale(3), v1.ColorJitter(0.1), v1.CenterCrop(64),
                          v1.ToTensor()]),
    "v2": v2.Compose([v2.ToImage(), v2.Resize(75), v2.CenterCrop(64), v2.ToDtype(torch.float32, scale=True)]),
    "twice": v1.Compose([v1.Resize((90, 120)), v1.CenterCrop(80), v1.Resize(64), v1.ToTensor()]),
}
SIZES = [(160, 120), (120, 160), (151, 97), (99, 99), (97, 203)]
each = pytest.mark.parametrize("name", TRANSFORMS)


def dot(size, x, y) -> PIL.Image.Image:
    """A white square of 6 x 6 pixels around the corner (x, y) between four pixels."""
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    picture[y - 3:y + 3, x - 3:x + 3] = 255
    return PIL.Image.fromarray(picture)


def brightness(transform, picture) -> torch.Tensor:
    """What became of the dot alone: [H, W]; the transform of a black picture is taken off."""
    black = PIL.Image.new("RGB", picture.size)
    return (transform(picture).double() - transform(black).double()).mean(dim=0).clamp(min=0)


@each
@pytest.mark.parametrize("size", SIZES)
def test_the_dot_is_where_the_point_says(name, size):
    transform, view, seen, gone = TRANSFORMS[name], view_of(TRANSFORMS[name], size), 0, 0
    for x, y in [(8, 9), (size[0] - 8, 11), (size[0] // 2, size[1] // 2), (31, size[1] - 20), (size[0] - 12, 61)]:
        light = brightness(transform, dot(size, x, y))
        assert view.size == (light.shape[1], light.shape[0])
        found = view.points(np.array([[x, y]], float))[0]
        if np.isnan(found).any():
            gone += 1
            assert np.isnan(found).all()
            middle = np.array([x, y]) * view.scale + view.shift
            assert ((middle < 0) | (middle >= view.size)).any()
            continue
        rows, columns = (torch.arange(side) + 0.5 for side in light.shape)
        centre = np.array([(light.sum(0) @ columns.double()), (light.sum(1) @ rows.double())]) / light.sum().item()
        edge = min(found.min(), *(np.array(view.size) - found)) < 5          # the dot itself is cut there
        assert np.abs(centre - found).max() < (3.5 if edge else 0.3), (x, y, centre, found)
        seen += 1
    assert seen >= 1 and seen + gone == 5


def test_by_hand():
    """448 x 336 for CLIP at 224: scaled to 298 x 224 (torchvision cuts off .67), then 37 off on the left."""
    view = view_of(preprocess(224), (448, 336))
    assert view.size == (224, 224)
    assert view.points(np.array([[224.0, 168.0], [448.0, 0.0], [10.0, 5.0]])).tolist() == [
        [pytest.approx(224 * 298 / 448 - 37), 112.0], [pytest.approx(float("nan"), nan_ok=True)] * 2,
        [pytest.approx(float("nan"), nan_ok=True)] * 2]


def test_boxes_are_cut_at_the_edge():
    view = view_of(v1.CenterCrop(100), (200, 100))                    # shows x from 50 to 150
    assert view.box(np.array([60.0, 10, 30, 20])).tolist() == [10, 10, 30, 20]
    assert view.box(np.array([0.0, 90, 70, 20])).tolist() == [0, 90, 20, 10]
    assert np.isnan(view.box(np.array([0.0, 0, 50, 50]))).all(), "it ends where the image begins"
    assert view_of(v1.Resize((50, 400)), (200, 100)).box(np.array([60.0, 10, 30, 20])).tolist() == [120, 5, 60, 10]


def test_the_edges_belong_as_pixels_do():
    view = view_of(v1.CenterCrop(100), (200, 100))
    inside = ~np.isnan(view.points(np.array([[50.0, 0], [149.9, 99.9], [150, 50], [49.9, 50], [60, 100]]))[:, 0])
    assert inside.tolist() == [True, True, False, False, False]
    assert np.isnan(view.points(np.array([[np.nan, np.nan]]))).all()


@pytest.mark.parametrize("step", [
    v1.RandomHorizontalFlip(), v1.RandomResizedCrop(64), v1.Pad(3), v1.Lambda(lambda picture: picture), len,
    v2.RandomCrop(10), image_transform_v2(PreprocessCfg(), is_train=True, aug_cfg=AugmentationCfg()),
    v1.RandomApply([v1.Grayscale(3)]), ResizeKeepRatio(64, random_scale_prob=0.5),
    ResizeKeepRatio(64, random_aspect_prob=0.5)])
def test_what_is_not_known_is_refused(step):
    with pytest.raises(ValueError, match="not known what .* points=False"):
        view_of(v1.Compose([v1.Resize(64), step]), (100, 100))
