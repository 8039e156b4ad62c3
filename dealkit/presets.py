"""One name -> model, data, concepts and settings that belong together."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import Dataset

from dealkit.concepts import ConceptBank, load_concepts
from dealkit.datasets import Birdworld, Photographs, bundled_photographs, photos
from dealkit.datasets.photo_set import hold_out
from dealkit.models import VLM, load_model
from dealkit.training import DealConfig


@dataclass
class Setup:
    """What a preset holds. `vlm` is a fresh model: nothing that another setup trained. `fresh()` makes one more.

    A preset that is only to look at has no `train`, `validation` and `config`: they are None. Presets of photographs
    have no `validation` unless a share was asked for, but for Waterbirds, which has one of its own.
    """

    name: str
    vlm: VLM
    train: Dataset | None
    validation: Dataset | None
    test: Dataset
    bank: ConceptBank
    config: DealConfig | None
    fresh: Callable[[], VLM]


# Birdworld's form of DEAL: the cosine overlap and the union (max) instead of the paper's product and sum, a guard
# against dead maps, and no gradient of the regularisers into the text tower. The weights are those of the recommended
# variant, chosen on the validation split without masks (data/birdworld/choice.csv); the preset is that variant without
# the swap, which is no part of DEAL.
BIRDWORLD_RECOMMENDED = DealConfig.recommended(lr=1e-4, batch_size=24)
BIRDWORLD = replace(BIRDWORLD_RECOMMENDED, swap=0.0)
# The paper's own form at the same rate and steps: product, sum, no guard, gradient into both towers.
BIRDWORLD_PAPER = DealConfig(lambda_disentangle=0.01, gamma_localize=0.01, lr=1e-4, batch_size=24)

# Photographs: Birdworld's form and weights with the paper's optimiser, rate and one epoch. Nobody has tuned it there.
PHOTOGRAPHS = replace(BIRDWORLD, lr=5e-7)
BATCH_SIZES = {"cub": 128, "oxford_pets": 32, "food101": 64, "eurosat": 8, "imagenet": 256,     # the paper's
               "waterbirds": 128}                                                               # ours: CUB's
PRESETS = ("birdworld", "clip", *BATCH_SIZES)
NOT_FETCHED = ("imagenet", "waterbirds")


def preset(name: str, pretrained: str | Path | None = "default", device: str | None = None, model: str | None = None,
           root: str | Path | None = None, download: bool = True, validation: float = 0.0) -> Setup:
    """Everything the notebooks need, by one name.

    Args:
        name: "birdworld"; "clip", the four photographs of scikit-image, to look at; or a data set of photographs,
            "cub", "oxford_pets", "food101", "eurosat", "imagenet", "waterbirds" (see `dealkit.datasets.photos`).
        pretrained: which weights. For birdworld "seed0" (the default) or "seed1", two pretraining runs; for the others
            "openai" (the default, 605 MB, fetched once), another tag of open_clip, or the path of a safetensors file.
            None gives random weights, the same ones in each call.
        device: None is the GPU where there is one, else the CPU.
        model: None is birdworld-vit, and OpenAI's ViT-B/32 for photographs; or another name for `load_model`.
        root: folder of the data set; None is the cache folder, see `dealkit.datasets.photos`.
        download: whether a data set that is not there may be fetched (ImageNet and Waterbirds never are).
        validation: share in [0, 1) of the photographs of the training split to hold out as `validation`.

    Returns:
        Setup with .vlm (a fresh model each call), .train, .validation, .test, .bank and .config; .fresh() is one more
        model with the same weights.

    Raises:
        ValueError: unknown preset; ImageNet or Waterbirds without `root`.
        ConnectionError: weights or images that are not on this computer and cannot be fetched.
        FileNotFoundError: ImageNet or Waterbirds, where `root` does not hold it.

    Example:
        >>> setup = preset("birdworld")
        >>> setup.bank["zorvit"][0]
        'red head'
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are: {', '.join(map(repr, PRESETS))}")
    if name in NOT_FETCHED and root is None:                     # before any weights are
        raise ValueError(f"{name} is not downloaded: pass root, the folder that you have it in")
    is_birdworld = name == "birdworld"
    weights = "openai" if pretrained == "default" and not is_birdworld else pretrained

    def fresh() -> VLM:
        with torch.random.fork_rng():        # random weights are the same in each call, and no one else's draws move
            torch.manual_seed(0)
            return load_model(model or ("birdworld-vit" if is_birdworld else "ViT-B-32-quickgelu"), weights, device)

    vlm = fresh()
    height, width = vlm.grid     # gamma weighs a sum over patches, so the same pull takes more of it on a coarser grid
    gamma = BIRDWORLD.gamma_localize * 100 / (height * width)
    if is_birdworld:
        train, held, test = (Birdworld(split, size=vlm.image_size[0]) for split in ("train", "validation", "test"))
        config = replace(BIRDWORLD, gamma_localize=gamma)
        return Setup(name, vlm, train, held, test, load_concepts(name), config, fresh)
    if name == "clip":
        return Setup(name, vlm, None, None, Photographs(bundled_photographs(), vlm.preprocess),
                     load_concepts("photographs"), None, fresh)
    options = {"root": root} if name in NOT_FETCHED else {"root": root, "download": download}
    train, test = (getattr(photos, name)(split, vlm.preprocess, **options) for split in ("train", "test"))
    train, held = hold_out(train, validation, seed=0) if validation else (train, None)
    if name == "waterbirds" and not validation:                  # it has a split of its own for that
        held = photos.waterbirds("validation", vlm.preprocess, root)
    config = replace(PHOTOGRAPHS, batch_size=BATCH_SIZES[name], gamma_localize=gamma)
    return Setup(name, vlm, train, held, test, load_concepts(name), config, fresh)
