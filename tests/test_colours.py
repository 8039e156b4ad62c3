"""Pictures that nobody is shut out of: legible in greyscale, with any colour vision, on a dark page, and in words."""

from __future__ import annotations

import base64
import sys
from io import BytesIO
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import PIL.Image
import pytest
import torch
from matplotlib.colors import to_rgb

from dealkit import plots

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
from colab import notebooks  # noqa: E402  (a script beside the notebooks, not a package)

NOTEBOOKS = notebooks()
# What the three kinds of dichromats see, on linear RGB: Machado, Oliveira and Fernandes (2009), severity 1.0.
VISION = {
    "common": np.eye(3),
    "protanopia": np.array([[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]]),
    "deuteranopia": np.array([[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]]),
    "tritanopia": np.array([[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .303900]]),
}
GRAPHICS = 3.0                 # least contrast of two areas that carry meaning: WCAG 2.2, criterion 1.4.11


def luminance(colour: np.ndarray, vision: str = "common") -> np.ndarray:
    """Relative luminance of sRGB colours [..., 3] in 0..1 (WCAG 2.2), which is what greyscale keeps."""
    linear = np.where(colour <= .04045, colour / 12.92, ((colour + .055) / 1.055) ** 2.4)
    return np.clip(linear @ VISION[vision].T, 0, 1) @ np.array([.2126, .7152, .0722])


def contrast(one, other) -> np.ndarray:
    """Contrast ratio of two luminances, 1 to 21 (WCAG 2.2)."""
    return (np.maximum(one, other) + .05) / (np.minimum(one, other) + .05)


def drawn(figure) -> np.ndarray:
    """A figure as the reader gets it: pixels [H, W, 3] in 0..1."""
    return np.asarray(PIL.Image.open(BytesIO(plots.png(figure))).convert("RGB")) / 255


def test_the_contrast_is_the_standards():
    assert contrast(luminance(np.zeros(3)), luminance(np.ones(3))) == pytest.approx(21)
    assert luminance(np.array(to_rgb("#777777"))) == pytest.approx(.1845, abs=1e-3)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("name", [plots.CMAP, "viridis"])
def test_scales_get_lighter_all_the_way(name, vision):
    colours = matplotlib.colormaps[name](np.linspace(0, 1, 64))[:, :3]
    steps = luminance(colours, vision)
    assert (np.diff(steps) > 0).all()
    assert contrast(steps[0], steps[-1]) > 7


def halves(brightness: float, vision: str) -> tuple[float, float]:
    """Luminances, as drawn, of a map that is 0 on the left and 1 on the right, over an image of one brightness."""
    image, maps = torch.full((1, 3, 64, 64), brightness), torch.zeros(1, 1, 8, 8)
    maps[..., 4:] = 1
    figure = plots.map_grid(image, maps, ["a concept"])
    figure.canvas.draw()
    box = figure.axes[1].get_window_extent()
    pixels = np.asarray(figure.canvas.buffer_rgba())[::-1, :, :3] / 255
    plt.close(figure)
    panel = luminance(pixels[int(box.y0) + 4:int(box.y1) - 4, int(box.x0) + 4:int(box.x1) - 4], vision)
    left, right = panel[:, :len(panel[0]) // 4], panel[:, -len(panel[0]) // 4:]
    assert right.min() > left.max()
    return float(np.median(left)), float(np.median(right))


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("brightness", [0., .5, 1.])
def test_a_map_is_read_on_any_image(brightness, vision):
    """The halves stay apart without colour."""
    assert contrast(*halves(brightness, vision)) >= GRAPHICS


def test_a_bright_map_is_told_from_a_dark_one_across_images():
    """The darkest 'here' (on a black image) is lighter than the lightest 'not here' (on a white one)."""
    _, here = halves(0., "common")
    absent, _ = halves(1., "common")
    assert here > absent and contrast(here, absent) >= GRAPHICS


@pytest.mark.parametrize("vision", VISION)
def test_the_outline_is_seen_on_every_shade(vision):
    """Line and halo are so far apart that one of them differs from whatever is beneath."""
    line, halo = luminance(np.array(to_rgb(plots.OUTLINE)), vision), 0.
    beneath = np.linspace(0, 1, 101)
    assert (np.maximum(contrast(line, beneath), contrast(halo, beneath)) >= GRAPHICS).all()
    image, mask = torch.ones(1, 3, 64, 64), torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    mask[..., 16:48, 16:48] = True
    plain = drawn(plots.map_grid(image, torch.ones(1, 1, 8, 8), ["a"]))
    outlined = drawn(plots.map_grid(image, torch.ones(1, 1, 8, 8), ["a"], masks=mask))
    changed = np.abs(plain - outlined).max(-1) > .3
    shades = luminance(outlined, vision)[changed]
    assert changed.sum() > 100 and contrast(shades.min(), shades.max()) >= GRAPHICS, "the halo is drawn, and the line"


def test_lines_differ_in_more_than_colour():
    import pandas as pd

    table = pd.DataFrame({"step": range(9), "contrastive": range(9)})
    figure = plots.histories({"one": table, "two": table, "three": table}, terms=("contrastive",))
    styles = [line.get_linestyle() for line in figure.axes[0].lines]
    plt.close(figure)
    assert len(set(styles)) == 3


@pytest.mark.parametrize("kind", ["figure", "bytes", "memoryview"])
def test_show_says_what_the_picture_shows(kind, monkeypatch):
    """The same bundle from a figure and from a widget's picture, in the form that every IPython from 7 on displays."""
    shown, file = [], plots.png(plt.figure(figsize=(1, 1)))
    monkeypatch.setattr(plots, "display", lambda *data, **options: shown.append((*data, options)))
    given = plt.figure(figsize=(1, 1)) if kind == "figure" else {"bytes": bytes, "memoryview": memoryview}[kind](file)
    plots.show(given, alt="nothing")
    ((data, options),) = shown
    assert base64.b64decode(data["image/png"]) == file and data["text/plain"] == "nothing"
    assert options == {"metadata": {"image/png": {"alt": "nothing"}}, "raw": True}
    assert not plt.get_fignums()


def pictures(path: Path) -> list:
    """(cell's source, output) of every PNG in a notebook."""
    cells = nbformat.read(path, as_version=4).cells
    return [(cell.source, output) for cell in cells for output in cell.get("outputs", [])
            if "image/png" in output.get("data", {})]


def test_every_picture_in_the_notebooks_speaks_and_has_a_ground():
    """An alternative of at least five words, and an opaque white ground: nothing black on a black page."""
    assert sum(len(pictures(path)) for path in NOTEBOOKS) > 40
    for path in NOTEBOOKS:
        for source, output in pictures(path):
            where = f"{path.name}: {source[-80:]!r}"
            assert len(output.metadata.get("image/png", {}).get("alt", "").split()) >= 5, where
            assert output.data["text/plain"] == output.metadata["image/png"]["alt"], where
            picture = PIL.Image.open(BytesIO(base64.b64decode(output.data["image/png"])))
            assert picture.mode in ("RGB", "L", "P") and "transparency" not in picture.info, where
            pixels = np.asarray(picture.convert("RGB"))
            corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
            assert (corners > 240).all(), where
