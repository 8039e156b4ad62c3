"""DEAL's objective: every term of the risk from one pass through the image trunk."""
from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dealkit.inputs import concept_lists
from dealkit.losses import contrastive_loss, disentangle_loss, guard_loss, localize_loss
from dealkit.maps import VARIABLES, choose_method, contributions, to_maps
from dealkit.models.recompute import check_switches, grad_checkpointing
from dealkit.normalize import at_least_float32, is_dead
from dealkit.training.config import DealConfig
from dealkit.training.multipliers import Multipliers
from dealkit.training.precision import autocast, in_float32
from dealkit.training.processes import Share, gather
from dealkit.training.swap import swap_method, swap_surroundings

TERMS = ("contrastive", "disentangle", "localize", "guard", "total", "dead_maps")


class DealObjective(nn.Module):
    """L = L_contrastive + lambda R_disentangle + gamma R_localize (+ guard), the relaxed risk of the paper.

    `forward` returns every term, unweighted, and their weighted sum "total". It runs the image trunk once: the image
    embedding and all maps come from the same split.

    With `config.freeze_text` the text tower has no gradient, and the concepts and the prompt of a category are encoded
    when an image first shows it, and kept: make a new objective where the text tower has changed.
    """

    def __init__(self, vlm, bank, config: DealConfig):
        super().__init__()
        if len(bank) == 0:
            raise ValueError("the concept bank is empty; load one with dealkit.load_concepts(name)")
        choose_method(vlm.tower, config.method)                  # an unknown one stops here, before any step
        swap_method(vlm.tower, config.swap_method)
        self.model = vlm.model                                   # registered, so that parameters() are the model's
        self.vlm, self.bank, self.config = vlm, bank, config
        poor = [category for category, concepts in bank.items() if len(concepts) < 2]
        if poor:
            raise ValueError(f"{', '.join(poor[:5])}: fewer than two concepts in the bank, so there is nothing to "
                             "disentangle; give every category at least two")
        _, self.n_concepts = concept_lists(bank, list(bank))
        if config.n_concepts is not None:
            if config.n_concepts > self.n_concepts:
                raise ValueError(f"n_concepts is {config.n_concepts}, and the shortest list of the bank has "
                                 f"{self.n_concepts}; give every category more concepts, or ask for fewer")
            self.n_concepts = config.n_concepts
        if config.checkpoint_activations:
            check_switches(vlm.tower.visual)
        self.multipliers = Multipliers(config)
        self._encoded: dict[str, Tensor] = {}                    # category -> [K + 1, D], where the tower is frozen

    def forward(self, images: Tensor, categories: list[str], captions: list[str], true: Tensor | None = None,
                share: Share | None = None) -> dict[str, Tensor]:
        """All terms for a batch.

        Args:
            images: [B, 3, H, W].
            categories, captions: B of each.
            true: [B, B] bool, caption j is true of image i.
            share: among several processes, what part of the global batch this is; `true` is then that of all images.
                The contrastive term is that of the whole batch in every process; the mean of the others over the
                processes is.
        """
        config = self.config
        caption_emb, explained = (self._kept_texts if config.freeze_text else self._texts)(categories, captions)
        method = choose_method(self.vlm.tower, config.method)
        with self._autocast():
            split = self.vlm.tower.split(images, kind=VARIABLES[method], save_memory=config.checkpoint_activations)
        split = in_float32(split, config.precision)
        image_emb = F.normalize(split.head(split.variable), dim=-1)
        # a second-order graph only where a regulariser will use it; without it the maps are constants, as if detached
        evidence = contributions(split, explained, self.vlm.grid,
                                 create_graph=config.regularised and not config.detach_maps, method=method)
        if share is not None:
            both = gather(torch.cat([image_emb, caption_emb], dim=1))[:share.total]
            image_emb, caption_emb = both.tensor_split([image_emb.shape[1]], dim=1)
        terms = {"contrastive": contrastive_loss(image_emb, caption_emb, self.vlm.logit_scale, true)}
        terms |= self._regularisers(evidence) if share is None else self._share_of_regularisers(evidence, share)
        dead = terms.pop("dead_maps")
        weights = self.multipliers.weights
        terms["total"] = (terms["contrastive"] + weights["disentangle"] * terms["disentangle"]
                          + weights["localize"] * terms["localize"] + config.guard * terms["guard"])
        return terms | {"dead_maps": dead}

    def swapped(self, images: Tensor, categories: list[str], seed: list[int]) -> Tensor:
        """The images of a step, some with exchanged surroundings, as the config says; `seed` is the step's."""
        config = self.config
        if config.swap == 0:
            return images
        asked = [text for c in categories for text in self._explained(c)[:-1]]
        with torch.no_grad():
            concepts = self._kept_texts(categories, asked)[0] if config.freeze_text else self._each(asked)
        generator = torch.Generator().manual_seed(int(np.random.default_rng(seed).integers(2 ** 62)))
        return swap_surroundings(self.vlm, images, concepts.unflatten(0, (len(categories), -1)), config.swap,
                                 config.swap_keep, config.swap_method, generator, config.precision)

    def _regularisers(self, evidence: Tensor) -> dict[str, Tensor]:
        """What depends on each image's own maps, as means over images."""
        config, maps = self.config, to_maps(evidence)
        concepts, category = maps[:, :-1], maps[:, -1]
        led = (concepts if config.localize_moves != "category" else concepts.detach(),
               category if config.localize_moves != "concepts" else category.detach())
        return {
            "disentangle": disentangle_loss(concepts, config.overlap),
            "localize": localize_loss(*led, config.aggregate),
            "guard": guard_loss(evidence.flatten(2, 3), config.guard_share),
            "dead_maps": is_dead(maps.detach()).float().mean(),
        }

    def _share_of_regularisers(self, evidence: Tensor, share: Share) -> dict[str, Tensor]:
        """The same, weighted so that their mean over the processes is the mean over all images; repeats weigh 0."""
        terms = self._regularisers(evidence[:max(share.real, 1)])
        weight = share.real * share.processes / share.total
        return {name: weight * value for name, value in terms.items()}

    def _texts(self, categories: list[str], captions: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings of the captions [B, D], and of what is explained [B, K + 1, D]: K concepts, then the category."""
        rows = [self._explained(category) for category in categories]
        asked = [text for row in rows for text in row]
        if self.config.stop_text_gradient:                       # nothing of them is kept for a backward pass
            with torch.no_grad():
                explained = self._each(asked)
            caption_emb = self._each(captions)
        else:
            caption_emb, explained = self._each([*captions, *asked]).split([len(captions), len(asked)])
        return caption_emb, explained.unflatten(0, (len(rows), -1))

    def _each(self, texts: list[str]) -> Tensor:
        """An embedding a text; equal ones go through the text tower once."""
        unique = list(dict.fromkeys(texts))
        place = {text: i for i, text in enumerate(unique)}
        index = torch.tensor([place[text] for text in texts], device=self.vlm.device)
        # embedding, not [index]: the backward of indexing adds up in any order when several threads share the work
        return F.embedding(index, self._encode(unique))

    @torch.no_grad()
    def _kept_texts(self, categories: list[str], captions: list[str]) -> tuple[Tensor, Tensor]:
        """As `_texts`, from a text tower that does not change.

        Every category is encoded by itself, and the other captions of a step together: what a text is encoded with may
        move its last bits, and must not depend on what a killed and resumed run has met before.
        """
        own = list(dict.fromkeys(categories))
        for category in own:
            if category not in self._encoded:
                self._encoded[category] = self._encode(self._explained(category))
        known = {text: row for category in own for text, row in zip(self._explained(category), self._encoded[category])}
        new = [text for text in dict.fromkeys(captions) if text not in known]
        known |= zip(new, self._encode(new)) if new else {}
        return (torch.stack([known[caption] for caption in captions]),
                torch.stack([self._encoded[category] for category in categories]))

    def _explained(self, category: str) -> list[str]:
        return [*self.bank[category][:self.n_concepts], self.config.category_prompt.format(category)]

    def _encode(self, texts: list[str]) -> Tensor:
        """[K, D] of unit norm in at least float32."""
        recompute = grad_checkpointing(self.model) if self.config.checkpoint_activations else nullcontext()
        with recompute, self._autocast():
            text_emb = self.vlm.encode_text(texts)
        return text_emb if self.config.precision == "float32" else F.normalize(at_least_float32(text_emb), dim=-1)

    def _autocast(self):
        return autocast(self.vlm.device, self.config.precision)
