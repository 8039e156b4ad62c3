"""Images through the trunk once: embeddings of a whole data set, kept in a file, and what can be read off them."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dealkit import metrics
from dealkit.evaluation.identity import identity, listed, weights_hash
from dealkit.evaluation.ranks import check_labels
from dealkit.normalize import at_least_float32


def embed(vlm, dataset, batch_size: int = 128, workers: int = 0, cache: str | Path | None = None,
          progress: bool = False) -> Tensor:
    """The embeddings of all images of a data set, in its order.

    Args:
        vlm: the model. dataset: items with `image`. batch_size: images at a time.
        workers: processes that load images; 0 loads them in this one.
        cache: a folder in which they are kept and found again; None keeps nothing. They are found again for the same
            weights, architecture, preprocessing and precision, and the same images: by the files' names, sizes and
            dates where the data set has a list of them (and by what it makes of eight of them), else by all pixels.
        progress: show a progress bar.

    Returns:
        `[N, D]` float32 of unit norm, on the CPU.

    Raises:
        ValueError: an empty data set; embeddings that are not finite.
        OSError: the folder cannot be made.

    Warns:
        UserWarning: a kept file is damaged, so that the images are embedded anew; or it cannot be written.

    Example:
        >>> image_emb = embed(vlm, dataset, cache="build/embeddings")
        >>> zero_shot(image_emb, vlm.encode_text([f"a photo of a {c}" for c in dataset.categories]), labels)
    """
    if len(dataset) == 0:
        raise ValueError("the data set is empty; look at how it was loaded, or at the n it was made with")
    path = None if cache is None else _place(Path(cache), vlm, dataset, batch_size, workers, progress)
    kept = None if path is None else _kept(path, len(dataset))
    if kept is not None:
        return kept
    parts = []
    with torch.no_grad():
        for batch in tqdm(loader(vlm, dataset, batch_size, workers), desc="embedding", disable=not progress,
                          leave=False):
            parts.append(vlm.encode_image(batch["image"].to(vlm.device, non_blocking=True)).float().cpu())
    emb = torch.cat(parts)
    bad = (~emb.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"the embeddings of {len(bad)} of {len(emb)} images are not finite, image {bad[0]} for "
                         "instance. Check the model (half precision, a diverged training run).")
    if path is not None:
        _keep(path, emb)
    return emb


def loader(vlm, dataset, batch_size: int, workers: int) -> DataLoader:
    """Batches in the data set's order, pinned where they travel to a GPU."""
    return DataLoader(dataset, batch_size, num_workers=workers, pin_memory=torch.device(vlm.device).type == "cuda")


def labels_of(dataset, name: str = "label") -> Tensor:
    """An integer of every item, `[N]`: its label, or its "group" or "background".

    A list of the data set's own (`labels`, `groups`, `backgrounds`) is taken where there is one, else every item is
    read.

    Raises:
        KeyError: the items have no such entry.
    """
    values = listed(dataset, f"{name}s")
    return torch.as_tensor(np.asarray([dataset[i][name] for i in range(len(dataset))] if values is None else values))


def zero_shot(embeddings: Tensor, text_emb: Tensor, labels: Tensor, groups: Tensor | None = None) -> pd.Series:
    """Zero-shot classification of embedded images: the category whose text, or texts, are nearest.

    Args:
        embeddings: of the images, `[N, D]`, from `embed`.
        text_emb: `[C, D]`, one text a category; or `[C, K, D]`, K texts a category, whose cosines are averaged (its
            concepts, for instance). Normalised inside.
        labels: `[N]` integers. groups: `[N]` integers, below 0 for an image of no group; as of Waterbirds.

    Returns:
        accuracy and worst_group_accuracy (NaN without groups), each with <name>_low and <name>_high (95 %, bootstrap
        over images); n, the number of images.

    Raises:
        ValueError: shapes or labels that do not fit; values that are not finite.

    Source: Radford et al., ICML 2021; the mean over several texts: Menon and Vondrick, ICLR 2023, eq. 1.
    """
    weights = category_weights(text_emb).cpu()
    if embeddings.ndim != 2 or embeddings.shape[1] != weights.shape[1]:
        raise ValueError(f"embeddings have shape {tuple(embeddings.shape)}, those of the texts "
                         f"{tuple(text_emb.shape)}; expected [N, D] and [C, D] or [C, K, D] of one model.")
    labels = check_labels(labels, len(embeddings), len(weights))
    correct = torch.cat([metrics.accuracy(F.normalize(emb.to(weights), dim=-1) @ weights.T, truth, reduction="none")
                         for emb, truth in zip(embeddings.cpu().split(4096), labels.split(4096))])
    groups = torch.full_like(labels, -1) if groups is None else torch.as_tensor(groups).cpu()
    if groups.shape != labels.shape:
        raise ValueError(f"groups have shape {tuple(groups.shape)}; expected one for each of {len(labels)} images.")
    correct, row = correct.double().numpy(), {}
    row["accuracy"], (row["accuracy_low"], row["accuracy_high"]) = correct.mean(), metrics.bootstrap_interval(correct)
    return pd.Series(row | worst_group(correct, groups.numpy()) | {"n": len(labels)})


def category_weights(text_emb: Tensor) -> Tensor:
    """`[C, D]` or `[C, K, D]` -> `[C, D]`: the product with a unit image embedding is the mean cosine with K texts.

    So N images and C categories need no tensor of N x C x K cosines. Not of unit norm where K > 1.

    Raises:
        ValueError: another shape; values that are not finite.
    """
    if text_emb.ndim not in (2, 3) or 0 in text_emb.shape:
        raise ValueError(f"text embeddings have shape {tuple(text_emb.shape)}; expected [C, D] or [C, K, D].")
    if not text_emb.isfinite().all():
        raise ValueError("text embeddings hold NaN or infinite values; check the model.")
    unit = F.normalize(at_least_float32(text_emb.detach()), dim=-1)
    return unit if unit.ndim == 2 else unit.mean(dim=1)


def worst_group(correct: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """worst_group_accuracy, over images with a group >= 0, with its interval."""
    def worst(rows: np.ndarray) -> float:
        return metrics.worst_group_accuracy(rows[:, 0], rows[:, 1])

    rows = np.stack([correct, groups], axis=1)[groups >= 0]
    value, interval = (worst(rows), metrics.bootstrap_interval(rows, worst)) if len(rows) else (np.nan, (np.nan,) * 2)
    return {"worst_group_accuracy": value, "worst_group_accuracy_low": interval[0],
            "worst_group_accuracy_high": interval[1]}


def _place(folder: Path, vlm, dataset, batch_size: int, workers: int, progress: bool) -> Path:
    """The file of these embeddings; its folder is made, so that an error comes before the work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {folder} for embeddings: {error}. Choose another cache, or None.") \
            from error

    def batches():                                   # nothing is loaded, and no bar shown, before it is asked for
        yield from tqdm(loader(vlm, dataset, batch_size, workers), desc="reading", disable=not progress, leave=False)

    return folder / f"embeddings-{weights_hash(vlm)[:16]}-{identity(dataset, batches())[:16]}.safetensors"


def _kept(path: Path, images: int) -> Tensor | None:
    """The embeddings in a file; None where there is none, or it is damaged."""
    if not path.exists():
        return None
    try:
        emb = load_file(path)["embeddings"]
        if emb.ndim != 2 or len(emb) != images or emb.dtype != torch.float32 or not emb.isfinite().all():
            raise ValueError(f"it holds {emb.dtype} {tuple(emb.shape)} instead of float32 [{images}, D]")
        return emb
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        warnings.warn(f"{path} is damaged ({error}); the images are embedded anew.", stacklevel=3)
        return None


def _keep(path: Path, emb: Tensor) -> None:
    """Write beside the place, then rename. A full disk costs the file, not the embeddings."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({"embeddings": emb.contiguous()}, temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"cannot keep the embeddings in {path}: {error}. They are used, and made anew next time.",
                      stacklevel=3)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
