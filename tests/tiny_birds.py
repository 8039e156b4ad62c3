"""A CLIP of a few thousand weights that speaks Birdworld's words, and what the tests of fine-tuning share."""
from __future__ import annotations

import json

import torch
from conftest import wake
from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg

from dealkit import ConceptBank, load_concepts
from dealkit.models import VLM, WordTokenizer
from dealkit.paths import data_path

BANK = load_concepts("birdworld")
WORDS = json.loads(data_path("birdworld", "vocab.json").read_text(encoding="utf-8"))


def bird_vlm(seed: int = 0, dtype: torch.dtype = torch.float32, **vision) -> VLM:
    """Random weights: a CLS-pooled ViT with 3 blocks and a grid of 5 x 5, unless `vision` says otherwise."""
    torch.manual_seed(seed)
    vision = {"image_size": 80, "patch_size": 16, "width": 32, "layers": 3, "head_width": 8, **vision}
    text = CLIPTextCfg(context_length=20, vocab_size=len(WORDS) + 3, width=16, heads=2, layers=2)
    model = CLIP(24, CLIPVisionCfg(**vision), text).to(dtype).eval()
    return VLM("tiny-birds", model, tokenizer=WordTokenizer(WORDS, 20))


def bird_resnet(seed: int = 0, dtype: torch.dtype = torch.float32) -> VLM:
    """A ModifiedResNet for birds of 64 pixels, with a grid of 2 x 2."""
    return wake(bird_vlm(seed, dtype, image_size=64, layers=(1, 1, 1, 1), width=8, head_width=64))


def weights(vlm: VLM) -> dict[str, torch.Tensor]:
    """A copy of all weights, to compare with later."""
    return {name: value.clone() for name, value in vlm.model.state_dict().items()}


def same(before: dict, after: dict) -> bool:
    """Are all tensors equal bit by bit?"""
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def bank_without(*categories: str) -> ConceptBank:
    return ConceptBank("birds", {name: concepts for name, concepts in BANK.items() if name not in categories})


class Recorder(torch.utils.data.Dataset):
    """Birdworld that notes which images are fetched, and breaks down at fetch number `fails_at`."""

    def __init__(self, birds, fails_at: int | None = None, spoil=None):
        self.birds, self.fails_at, self.spoil = birds, fails_at, spoil
        self.categories, self.fetched = birds.categories, []

    def __len__(self):
        return len(self.birds)

    def __getitems__(self, indices):
        if len(self.fetched) == self.fails_at:
            raise RuntimeError("the power went off")
        self.fetched.append(list(indices))
        items = self.birds.__getitems__(indices)
        return [self.spoil(item) for item in items] if self.spoil else items
