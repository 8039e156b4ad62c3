"""One name -> model, data, concepts and settings that belong together."""
from __future__ import annotations

from dataclasses import dataclass

from torch.utils.data import Dataset

from dealkit.concepts import ConceptBank, load_concepts
from dealkit.datasets import Birdworld, Photographs, bundled_photographs
from dealkit.models import VLM, load_model
from dealkit.training import DealConfig


@dataclass
class Setup:
    """What a preset holds. `vlm` is a fresh model: nothing that another setup trained.

    A preset that is only to look at has no `train`, `validation` and `config`: they are None.
    """

    name: str
    vlm: VLM
    train: Dataset | None
    validation: Dataset | None
    test: Dataset
    bank: ConceptBank
    config: DealConfig | None


# Birdworld's form of DEAL: the cosine overlap and the union (max) instead of the paper's product and sum, a guard
# against dead maps, and no gradient of the regularisers into the text tower. The weights were chosen on the validation
# split without masks (`python data/birdworld/study.py --choose`): a larger lambda lowers the overlap hardly any further
# and begins to cost concept accuracy; a larger gamma raises the overlap.
BIRDWORLD = DealConfig(lambda_disentangle=3.0, gamma_localize=0.02, overlap="cosine", aggregate="max", guard=2.0,
                       stop_text_gradient=True, lr=1e-4, epochs=2, batch_size=48)
# The paper's own form at the same rate and steps: product, sum, no guard, gradient into both towers.
BIRDWORLD_PAPER = DealConfig(lambda_disentangle=0.01, gamma_localize=0.01, lr=1e-4, epochs=2, batch_size=48)


def preset(name: str, pretrained: str | None = "default", device: str | None = None) -> Setup:
    """Everything the notebooks need, by one name.

    Args:
        name: "birdworld"; or "clip": OpenAI's ViT-B/32 with the four photographs of scikit-image, to look at.
        pretrained: which weights; for birdworld "seed0" (the default) or "seed1", two pretraining runs; for clip
            "openai" (the default, 605 MB, fetched once) or the path of a safetensors file.
        device: None is the GPU where there is one, else the CPU.

    Returns:
        Setup with .vlm (a fresh model each call), .train, .validation, .test, .bank and .config.

    Raises:
        ValueError: unknown preset.
        ConnectionError: clip, where the weights are not on this computer and cannot be fetched.

    Example:
        >>> setup = preset("birdworld")
        >>> setup.bank["zorvit"][0]
        'red head'
    """
    if name == "birdworld":
        return Setup(name, load_model("birdworld-vit", pretrained=pretrained, device=device), Birdworld("train"),
                     Birdworld("validation"), Birdworld("test"), load_concepts("birdworld"), BIRDWORLD)
    if name == "clip":
        vlm = load_model("ViT-B-32-quickgelu", "openai" if pretrained == "default" else pretrained, device=device)
        return Setup(name, vlm, None, None, Photographs(bundled_photographs(), vlm.preprocess),
                     load_concepts("photographs"), None)
    raise ValueError(f"unknown preset {name!r}; there are: 'birdworld', 'clip'")
