"""Models that several tests share: built once, random weights, nothing fetched."""

from __future__ import annotations

import pytest
import torch
from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg

from dealkit.datasets import Birdworld
from dealkit.models import VLM, WordTokenizer, load_model

WORDS = ["red", "blue", "head", "wing", "belly", "bird", "a", "with"]
TEXT = {"context_length": 8, "vocab_size": len(WORDS) + 3, "width": 16, "heads": 2, "layers": 2}


def tiny_vlm(dtype=torch.float64, seed=0, text=None, **vision) -> VLM:
    """A CLIP of a few thousand weights around any image tower."""
    torch.manual_seed(seed)
    model = CLIP(24, CLIPVisionCfg(**vision), CLIPTextCfg(**(text or TEXT))).to(dtype).eval()
    return VLM("tiny", model, tokenizer=WordTokenizer(WORDS, 8))


def tiny_vit(dtype=torch.float64, seed=0, **vision) -> VLM:
    """A CLS-pooled ViT: 3 blocks, 4 heads, a grid of 4 x 3."""
    return tiny_vlm(dtype, seed, **{"layers": 3, "width": 32, "head_width": 8, "patch_size": 8, "image_size": (32, 24),
                                    **vision})


def tiny_resnet(dtype=torch.float64, seed=0) -> VLM:
    """A ModifiedResNet with one block a stage and a grid of 3 x 3."""
    return wake(tiny_vlm(dtype, seed, layers=(1, 1, 1, 1), width=8, head_width=64, image_size=96))


def wake(vlm: VLM) -> VLM:
    """Give a random ModifiedResNet sensible statistics.

    open_clip starts the last BatchNorm of every block at 0, which cuts the residual branches off, and the running
    statistics of a network that has seen nothing make its features shrink or explode.
    """
    visual = vlm.model.visual
    for name, module in visual.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # running statistics are the plain mean of what was seen
            if name.endswith("bn3"):
                torch.nn.init.ones_(module.weight)
    visual.train()
    with torch.no_grad():
        visual(random_images(vlm, 8, seed=99))
    visual.eval()
    return vlm


# what `explain` is tested with: a model to build, and a method that it has
METHODS = [(tiny_vit, "relevance"), (tiny_vit, "gradcam"), (tiny_vit, "gradeclip"), (tiny_vit, "legrad"),
           (tiny_vit, "every_exit"), (tiny_resnet, "gradcam")]


def random_images(vlm: VLM, count: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *vlm.image_size, generator=generator, dtype=torch.float64).to(vlm.dtype)


def random_embeddings(vlm: VLM, *shape: int, seed: int = 2) -> torch.Tensor:
    """Text embeddings `[*shape, D]`, not of unit norm."""
    generator = torch.Generator().manual_seed(seed)
    size = vlm.model.visual.output_dim
    return torch.randn(*shape, size, generator=generator, dtype=torch.float64).to(vlm.dtype)


@pytest.fixture(scope="session")
def vit() -> VLM:
    torch.manual_seed(0)
    return load_model("ViT-B-32-quickgelu", pretrained=None, device="cpu")


@pytest.fixture(scope="session")
def rn50() -> VLM:
    torch.manual_seed(0)
    return wake(load_model("RN50", pretrained=None, device="cpu"))


@pytest.fixture(scope="session")
def birdworld_random() -> VLM:
    torch.manual_seed(0)
    return load_model("birdworld-vit", pretrained=None, device="cpu")


@pytest.fixture(scope="module")
def vlm() -> VLM:
    """Any CLIP that knows Birdworld's words; a test file may have another one of this name."""
    from tiny_birds import bird_vlm  # here, because that file imports this one

    return bird_vlm()


@pytest.fixture(scope="module")
def birds() -> Birdworld:
    return Birdworld("test", n=32)
