"""DEAL's objective: every term of the risk from one pass through the image trunk."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dealkit.inputs import concept_lists
from dealkit.losses import contrastive_loss, disentangle_loss, guard_loss, localize_loss
from dealkit.maps import VARIABLES, choose_method, contributions, to_maps
from dealkit.normalize import is_dead
from dealkit.training.config import DealConfig

TERMS = ("contrastive", "disentangle", "localize", "guard", "total", "dead_maps")


class DealObjective(nn.Module):
    """L = L_contrastive + lambda R_disentangle + gamma R_localize (+ guard), the relaxed risk of the paper.

    `forward` returns every term, unweighted, and their weighted sum "total". It runs the image trunk once: the image
    embedding and all maps come from the same split.
    """

    def __init__(self, vlm, bank, config: DealConfig):
        super().__init__()
        if len(bank) == 0:
            raise ValueError("the concept bank is empty; load one with dealkit.load_concepts(name)")
        choose_method(vlm.tower, config.method)                  # an unknown one stops here, before any step
        self.model = vlm.model                                   # registered, so that parameters() are the model's
        self.vlm, self.bank, self.config = vlm, bank, config
        poor = [category for category, concepts in bank.items() if len(concepts) < 2]
        if poor:
            raise ValueError(f"{', '.join(poor[:5])}: fewer than two concepts in the bank, so there is nothing to "
                             "disentangle; give every category at least two")
        _, self.n_concepts = concept_lists(bank, list(bank))

    def forward(self, images: torch.Tensor, categories: list[str], captions: list[str],
                true: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Args: images [B, 3, H, W]; B category names; B captions; true [B, B] bool, caption j is true of image i."""
        config, vlm = self.config, self.vlm
        concepts = [self.bank[c][:self.n_concepts] for c in categories]
        prompts = [config.category_prompt.format(c) for c in categories]
        wanted = [*captions, *prompts, *(phrase for row in concepts for phrase in row)]
        unique = list(dict.fromkeys(wanted))                     # each text goes through the text tower once
        place = {text: i for i, text in enumerate(unique)}
        rows = torch.tensor([place[text] for text in wanted], device=vlm.device)
        # embedding, not [rows]: the backward of indexing adds up in any order when several threads share the work
        text_emb = F.embedding(rows, vlm.encode_text(unique))
        batch = len(categories)
        caption_emb, explained = text_emb[:batch], text_emb[batch:]
        # [B, K + 1, D]: the K concepts of each image, then its category
        explained = torch.cat([explained[batch:].unflatten(0, (batch, -1)), explained[:batch, None]], dim=1)
        if config.stop_text_gradient:
            explained = explained.detach()

        split = vlm.tower.split(images, kind=VARIABLES[choose_method(vlm.tower, config.method)])
        image_emb = F.normalize(split.head(split.variable), dim=-1)
        # a second-order graph only where a regulariser will use it; without it the maps are constants, as if detached
        regularised = config.lambda_disentangle > 0 or config.gamma_localize > 0 or config.guard > 0
        evidence = contributions(split, explained, vlm.grid, create_graph=regularised and not config.detach_maps)
        maps = to_maps(evidence)
        terms = {
            "contrastive": contrastive_loss(image_emb, caption_emb, vlm.logit_scale, true),
            "disentangle": disentangle_loss(maps[:, :-1], config.overlap),
            "localize": localize_loss(maps[:, :-1], maps[:, -1], config.aggregate),
            "guard": guard_loss(evidence.flatten(2, 3), config.guard_share),
        }
        terms["total"] = (terms["contrastive"] + config.lambda_disentangle * terms["disentangle"]
                          + config.gamma_localize * terms["localize"] + config.guard * terms["guard"])
        terms["dead_maps"] = is_dead(maps.detach()).float().mean()
        return terms
