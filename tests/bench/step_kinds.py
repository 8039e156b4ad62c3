"""The steps that step.py times: one model with a batch, and a training step of each kind on it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import dealkit
from dealkit.maps import cosines, explain
from dealkit.models import load_model
from dealkit.models.words import encode_tokens, tokenize
from dealkit.presets import PHOTOGRAPHS
from dealkit.training import DealConfig, DealObjective, draw_captions
from dealkit.training.precision import autocast
from dealkit.training.processes import Processes
from dealkit.training.step import make_trainer, take_step

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attention_watch import OpenMultihead, Watch  # noqa: E402
from conftest import wake  # noqa: E402


class Bench:
    """One model with a batch, and a step of each kind on it."""

    def __init__(self, name: str, batch: int, k: int, device: str, precision: str):
        torch.manual_seed(0)
        self.vlm = load_model(name, pretrained=None, device=device)
        if name.startswith("RN"):
            wake(self.vlm)                               # an untouched ResNet computes with denormal numbers: slow
        bank = dealkit.load_concepts("cub")
        self.bank = dealkit.ConceptBank("cub", {category: concepts[:k] for category, concepts in bank.items()})
        self.config = replace(PHOTOGRAPHS, batch_size=batch, precision=precision)
        rng = np.random.default_rng(0)
        self.categories = [list(bank)[i] for i in rng.integers(len(bank), size=batch)]
        captions, true = draw_captions(self.categories, self.bank, self.config, rng)
        self.captions, self.true = captions, true.to(self.vlm.device)
        self.images = torch.randn(batch, 3, *self.vlm.image_size, device=self.vlm.device)
        self.explained = [[*self.bank[c], self.config.category_prompt.format(c)] for c in self.categories]

    def step(self, kind: str) -> Callable[[], object]:
        """A function that takes one step of this kind."""
        config = {"deal": self.config, "deal_frozen_text": replace(self.config, freeze_text=True)}.get(kind)
        if config is not None:
            return self._deal(config)
        optimizer = make_trainer(DealObjective(self.vlm, self.bank, self.config),
                                 Processes(self.vlm, self.config.precision)).optimizer
        loss = getattr(self, f"_{kind}")

        def call() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        return call

    def _deal(self, config: DealConfig) -> Callable[[], object]:
        text_tower = [p for name, p in self.vlm.model.named_parameters() if not name.startswith(("visual.", "logit_"))]

        def train_text(yes: bool) -> None:
            for parameter in text_tower if config.freeze_text else []:
                parameter.requires_grad_(yes)

        train_text(False)
        trainer = make_trainer(DealObjective(self.vlm, self.bank, config), Processes(self.vlm, config.precision))
        train_text(True)

        def call() -> None:
            train_text(False)
            take_step(trainer, 0, self.images, self.categories, self.captions, self.true)
            trainer.optimizer.zero_grad()
            train_text(True)
        return call

    def _contrastive(self, encode: Callable[[list[str]], torch.Tensor]) -> torch.Tensor:
        with autocast(self.vlm.device, self.config.precision):
            image_emb, text_emb = self.vlm.encode_image(self.images), encode(self.captions)
        return dealkit.contrastive_loss(image_emb.float(), text_emb.float(), self.vlm.logit_scale, self.true)

    def _whole_texts(self, texts: list[str]) -> torch.Tensor:
        tokens = tokenize(self.vlm.tokenizer, texts, self.vlm.model.context_length).to(self.vlm.device)
        return F.normalize(encode_tokens(self.vlm.model, tokens, cut=False), dim=-1)

    def _plain(self) -> torch.Tensor:
        return self._contrastive(self.vlm.encode_text)

    def _floor(self) -> torch.Tensor:
        # as DEAL has them: equal texts once, and without a graph where the regularisers do not move the text tower
        precise = autocast(self.vlm.device, self.config.precision)
        with torch.set_grad_enabled(not self.config.stop_text_gradient), precise:
            self.vlm.encode_text(list(dict.fromkeys(text for row in self.explained for text in row)))
        return self._plain()

    def _per_text(self) -> torch.Tensor:
        for image, texts in zip(self.images, self.explained):
            with autocast(self.vlm.device, self.config.precision):
                text_emb = self._whole_texts(texts)
                self._stock_maps(image.expand(len(texts), -1, -1, -1), text_emb)
        return self._contrastive(self._whole_texts)

    def _stock_maps(self, images: torch.Tensor, text_emb: torch.Tensor) -> torch.Tensor:
        """Maps `[B, h, w]` of text b on image b, by one pass of the stock model: relevance, or Grad-CAM of a ResNet."""
        visual = self.vlm.model.visual
        if hasattr(visual, "layer4"):
            features = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))
            gradient = torch.autograd.grad(cosines(visual.attnpool(features), text_emb[:, None]).sum(), features)[0]
            return (features * gradient.mean(dim=(2, 3), keepdim=True)).sum(dim=1).relu().detach()
        watch, block = Watch(), visual.transformer.resblocks[-1]
        stock, block.attn = block.attn, OpenMultihead(block.attn, watch)
        embedding, attention = visual(images), watch.calls[-1]["attention"]
        block.attn = stock
        gradient = torch.autograd.grad(cosines(embedding, text_emb[:, None]).sum(), attention)[0]
        return (gradient * attention)[:, :, 0, 1:].relu().mean(1).unflatten(-1, self.vlm.grid).detach()

    def largest_difference(self, images: int = 4) -> float:
        """Between our maps and the stock model's, a pass a text: the largest, in units of the largest value."""
        few = self.images[:images]
        with torch.no_grad():
            emb = self.vlm.encode_text(self.explained[0])
        ours = explain(self.vlm, few, emb)
        theirs = torch.stack([self._stock_maps(few, text.expand(len(few), -1)) for text in emb], dim=1)
        return ((ours - theirs).abs().max() / theirs.max()).item()
