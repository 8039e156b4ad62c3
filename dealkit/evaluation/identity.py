"""When are kept embeddings those of this model and these images? Two checksums."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence

import open_clip
import torch
from torch import Tensor

from dealkit.evaluation.columns import evenly_spread
from dealkit.models.weights import weights_digest

FILE_LISTS = ("files", "paths", "samples")       # attributes of data sets: paths, as they are or below `root`; or
                                                 # tuples that begin with one
PROBES = 8


def weights_hash(vlm) -> str:
    """A checksum of everything that makes an embedding out of an image: weights, modules, name and preprocessing."""
    digest = hashlib.sha256()
    settings = open_clip.get_model_preprocess_cfg(vlm.model)
    # models of the same weights may differ in what has none, GELU and QuickGELU for instance; addresses do not count
    modules = re.sub(r" at 0x[0-9a-f]+", "", repr(vlm.model))
    mode = [vlm.name, vlm.model.training, str(vlm.dtype), settings, modules]
    digest.update(json.dumps(mode, sort_keys=True, default=str).encode())
    digest.update(weights_digest(vlm.model).encode())
    return digest.hexdigest()


def identity(dataset, batches: Iterable[dict]) -> str:
    """A checksum of the images of a data set, and of its categories.

    Where it has a list of files, they are told by name, size and date, and the pixels of eight items tell what the
    transform makes of them. Else all pixels are read: no pass through the trunk, but one through the data.

    Args:
        dataset: map-style. batches: all of it, once through; read only where there is no list of files.
    """
    digest, files = hashlib.sha256(), _files(dataset)
    digest.update(json.dumps([len(dataset), [str(c) for c in getattr(dataset, "categories", [])]]).encode())
    if files is None:
        pictures = (image for batch in batches for image in batch["image"])
    else:
        digest.update(json.dumps([[path, *_state(path)] for path in files]).encode())
        pictures = (dataset[i]["image"] for i in evenly_spread(PROBES, len(dataset)))
    for picture in pictures:
        digest.update(f"{picture.dtype} {tuple(picture.shape)}".encode())
        digest.update(_bytes(picture))
    return digest.hexdigest()


def listed(dataset, name: str) -> Sequence | None:
    """An attribute of a data set that holds one value an item, also through torch's `Subset`; None where there is none.
    """
    values = getattr(dataset, name, None)
    if values is not None and hasattr(values, "__len__") and len(values) == len(dataset):
        return values
    indices, inner = getattr(dataset, "indices", None), getattr(dataset, "dataset", None)
    values = None if indices is None or inner is None or len(indices) != len(dataset) else listed(inner, name)
    return None if values is None else [values[i] for i in indices]


def _files(dataset) -> list[str] | None:
    """The paths of all items; None where the data set has no list of them, or one of them is no file here."""
    for name in FILE_LISTS:
        paths = [value[0] if isinstance(value, (tuple, list)) else value for value in listed(dataset, name) or ()]
        if paths and all(isinstance(path, (str, os.PathLike)) for path in paths):
            paths = [os.path.join(_root(dataset), path) for path in paths]       # an absolute path stays as it is
            if all(map(os.path.isfile, paths)):
                return paths
    return None


def _root(dataset) -> str:
    """The folder that a data set's files are relative to; "" where it does not say."""
    root = getattr(dataset, "root", None)
    inner = getattr(dataset, "dataset", None)
    if root is None and inner is not None:
        return _root(inner)
    return os.fspath(root) if isinstance(root, (str, os.PathLike)) else ""


def _state(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
