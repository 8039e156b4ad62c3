"""What a reader looks at: images, maps on images with the true masks outlined, overlap matrices, intervals.

Every function returns a matplotlib figure; `show` puts it on the page with a text for those who cannot see it. All maps
share one perceptually uniform scale from 0 to 1 (each map is min-max normalised), with a colour bar.
"""
from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from io import BytesIO
from textwrap import wrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import seaborn as sns
import torch.nn.functional as F
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

from dealkit import metrics
from dealkit.maps import normalize_maps

CMAP = "magma"
OUTLINE = "#35d0ff"            # of the true mask: light blue, which magma does not contain
OPACITY = 0.65                 # of a map over its image: light and dark stay apart in greyscale on any image


def show(fig: Figure | bytes | memoryview, alt: str, dpi: int = 80, dither: bool = False) -> None:
    """Display a figure as PNG, or a PNG file as it is, with `alt` as its text alternative; closes the figure.

    Args:
        fig: a figure, or the bytes of a PNG (a widget's picture, for instance).
        alt: what the picture shows, for those who cannot see it.
        dpi: pixels for each inch of a figure. dither: see `png`.
    """
    data = png(fig, dpi, dither) if isinstance(fig, Figure) else bytes(fig)     # a widget holds a memoryview
    # not IPython's Image: in Colab's IPython 7 it has no place for the alternative
    display({"image/png": b64encode(data).decode(), "text/plain": alt}, metadata={"image/png": {"alt": alt}}, raw=True)


def png(fig: Figure, dpi: int = 80, dither: bool = False) -> bytes:
    """A figure as a small PNG file; closes the figure. dither: for photographs, whose colours 256 steps would band."""
    file, small = BytesIO(), BytesIO()
    fig.savefig(file, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")
    plt.close(fig)
    # 256 colours, spread over all that occur: an eighth of the size, so that notebooks with many birds stay small
    picture = PIL.Image.open(file).convert("RGB")
    palette = picture.quantize(256, PIL.Image.Quantize.MAXCOVERAGE)
    picture = picture.quantize(palette=palette, dither=PIL.Image.Dither.FLOYDSTEINBERG) if dither else palette
    picture.save(small, "png", optimize=True)
    return small.getvalue()


def image_grid(images: Tensor, titles: list[str] | None = None, columns: int = 8) -> Figure:
    """Images [B, 3, H, W] in 0..1, in rows of `columns`, with titles."""
    rows = -(-len(images) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(1.5 * columns, 1.75 * rows), squeeze=False, layout="constrained")
    for i, axis in enumerate(axes.flat):
        axis.axis("off")
        if i < len(images):
            axis.imshow(_pixels(images[i]))
            axis.set_title(titles[i] if titles else "", fontsize=9)
    return fig


def map_grid(images: Sequence[Tensor], maps: Sequence[Tensor], concepts: list[list[str]] | list[str],
             masks: Sequence[Tensor] | None = None, rows: list[str] | None = None) -> Figure:
    """One row an image: the image, then one panel a concept with its map, the true mask outlined.

    Args:
        images: B images [3, H, W] in 0..1, a tensor or a list of any sizes; repeat one to compare models in rows.
        maps: B tensors [K, h, w], any scale >= 0. concepts: K names for all rows, or B lists of K.
        masks: B tensors [K, H, W] bool. rows: B labels.
    """
    b, k = len(maps), len(maps[0])
    concepts = concepts if isinstance(concepts[0], (list, tuple)) else [concepts] * b
    fig, axes = plt.subplots(b, k + 1, figsize=(1.6 * (k + 1) + .6, 1.75 * b), squeeze=False, layout="constrained")
    for i in range(b):
        axes[i, 0].imshow(_pixels(images[i]))
        axes[i, 0].set_ylabel(rows[i] if rows else "", fontsize=9)
        grey = .35 + .65 * images[i].mean(0).cpu().numpy()      # lightened, so that it shows through
        fine = F.interpolate(normalize_maps(maps[i][None].detach().float().cpu()), size=images[i].shape[-2:],
                             mode="bilinear")[0]
        for j in range(k):
            axis = axes[i, j + 1]
            axis.imshow(grey, cmap="gray", vmin=0, vmax=1)
            picture = axis.imshow(fine[j].numpy(), cmap=CMAP, vmin=0, vmax=1, alpha=OPACITY)
            if masks is not None and masks[i][j].any():
                outline = axis.contour(masks[i][j].cpu().numpy(), levels=[.5], colors=OUTLINE, linewidths=1.2)
                outline.set(path_effects=[withStroke(linewidth=2.6, foreground="black")])   # seen on bright maps too
            if i == 0 or concepts[i] != concepts[0]:
                axis.set_title(_label(concepts[i][j]), fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    bar = fig.colorbar(picture, ax=axes[:, -1], fraction=.06, pad=.02)
    bar.set_label("relevance (each map 0 to 1)", fontsize=8)
    return fig


def overlap_matrix(maps: Tensor, names: list[str], title: str = "") -> Figure:
    """Mean cosine between the maps of every two concepts, maps [B, K, h, w]: 1 on the diagonal, 0 is no overlap."""
    return overlap_matrices([maps], names, [title])


def overlap_matrices(models: list[Tensor], names: list[str], titles: list[str]) -> Figure:
    """`overlap_matrix` for the maps [B, K, h, w] of several models, side by side."""
    k, n, labels = len(names), len(models), [_label(name) for name in names]
    room = .5 * max(label.count("\n") for label in labels)       # inches, for labels of two lines or three
    fig, axes = plt.subplots(1, n, figsize=(n * (max(.75 * k, 1.2) + room) + 1.6, .65 * k + 1 + room), sharey=True,
                             squeeze=False, layout="constrained")
    for axis, maps, title in zip(axes[0], models, titles):
        table = np.ones((k, k))
        for i in range(k):
            for j in range(i):
                table[i, j] = table[j, i] = metrics.overlap(maps[:, [i, j]], "cosine")
        sns.heatmap(table, vmin=0, vmax=1, cmap="viridis", annot=True, fmt=".2f", ax=axis, yticklabels=labels,
                    cbar=axis is axes[0, -1], cbar_kws={"label": "cosine of the maps"})
        axis.set_title(title, fontsize=10)
        axis.set_xticks(np.arange(k) + .5, labels, rotation=35, ha="right")
        axis.tick_params(axis="y", rotation=0)
    return fig


def histories(tables: dict[str, pd.DataFrame],
              terms: tuple[str, ...] = ("contrastive", "disentangle", "localize")) -> Figure:
    """The terms of the loss over the steps (running mean of 5), one line a run."""
    fig, axes = plt.subplots(1, len(terms), figsize=(3.2 * len(terms), 2.6), squeeze=False, layout="constrained")
    for axis, term in zip(axes[0], terms):
        for (name, table), style in zip(tables.items(), ("-", "--", ":", "-.") * 3):
            axis.plot(table["step"], table[term].rolling(5, min_periods=1).mean(), style, label=name)
        axis.set(title=term, xlabel="step")
    axes[0, 0].legend(fontsize=8)
    return fig


def intervals(differences: pd.DataFrame, metrics_shown: list[str], titles: list[str] | None = None) -> Figure:
    """Paired differences to a baseline (see `study.paired_differences`): mean and interval, one panel a metric."""
    rows = list(dict.fromkeys(differences["row"]))
    fig, axes = plt.subplots(1, len(metrics_shown), figsize=(2.3 * len(metrics_shown) + 1.5, .32 * len(rows) + 1.1),
                             sharey=True, squeeze=False, layout="constrained")
    for axis, metric, title in zip(axes[0], metrics_shown, titles or metrics_shown):
        part = differences[differences["metric"] == metric].set_index("row").loc[rows]
        y = np.arange(len(rows))
        axis.axvline(0, color="grey", linewidth=1)
        axis.hlines(y, part["low"], part["high"], color=sns.color_palette("colorblind")[0], linewidth=2)
        axis.plot(part["mean"], y, "o", color=sns.color_palette("colorblind")[0], markersize=5)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.locator_params(axis="x", nbins=4)                   # more labels would run into each other
    axes[0, 0].set_yticks(range(len(rows)), rows)
    axes[0, 0].set_ylim(len(rows) - .5, -.5)                     # the first row on top, and no marker cut in half
    return fig


def concept_bars(table: pd.DataFrame, title: str = "") -> Figure:
    """Mean cosine of each concept with images of its own category and of others; the AUC stands beside its name.

    Args:
        table: rows of one category from `evaluation.concept_table`.
    """
    names = [f"{row.concept}   (AUC {row.auc:.2f})" for row in table.itertuples()]
    both = pd.DataFrame({"concept": names * 2, "cosine": [*table["own"], *table["others"]],
                         "images": ["of this category"] * len(names) + ["of other categories"] * len(names)})
    fig, axis = plt.subplots(figsize=(6.5, .5 * len(names) + 1.2), layout="constrained")
    sns.barplot(both, y="concept", x="cosine", hue="images", palette=["#31688e", "#fdb863"], ax=axis)
    axis.axvline(0, color="grey", linewidth=1)
    axis.set(title=title, ylabel="", xlabel="mean cosine with the images")
    axis.legend(title="images", fontsize=8, loc="center left", bbox_to_anchor=(1, .5))
    return fig


def _label(text: str) -> str:
    """A concept in at most 3 lines of 18 characters."""
    return "\n".join(wrap(text, 18)[:3])


def _pixels(image: Tensor) -> np.ndarray:
    return image.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
