"""The captions of fine-tuning: drawn from the bank, each true of its image."""
from __future__ import annotations

import torch

from dealkit.training.config import DealConfig


def draw_captions(categories: list[str], bank, config: DealConfig, rng) -> tuple[list[str], torch.Tensor]:
    """One true caption an image: its name, its name with concepts, or concepts alone (so that words are not forgotten).

    Returns:
        B captions, and a [B, B] bool matrix: is caption j true of image i (as far as the bank knows)? True pairs off
        the diagonal are no negatives.
    """
    captions, claims = [], []
    for category in categories:
        concepts = bank[category]
        some = [concepts[i] for i in rng.permutation(len(concepts))[:rng.integers(1, len(concepts) + 1)]]
        name = config.category_prompt.format(category)
        kind = rng.random()
        if kind >= config.concept_captions:
            captions.append(name)
            claims.append((category, ()))
        elif kind < config.concept_captions / 3:
            captions.append(f"{name} with {', '.join(some)}")
            claims.append((category, ()))
        else:
            captions.append(", ".join(some))
            claims.append((None, some))
    return captions, _true_of(categories, claims, bank)


def _true_of(categories: list[str], claims: list[tuple], bank) -> torch.Tensor:
    """[B, B] bool: does category i have the name and all the concepts that claim j makes?

    Each claim is looked up once for all images: asking every pair would take longer than a GPU takes for the step.
    """
    own = list(dict.fromkeys(categories))
    owners = {}                                              # concept -> the categories that have it
    for category in own:
        for concept in bank[category]:
            owners.setdefault(concept, set()).add(category)
    place = {category: i for i, category in enumerate(own)}
    true = torch.zeros(len(own), len(claims), dtype=torch.bool)
    for j, (named, some) in enumerate(claims):
        having = {named} if named is not None else set.intersection(*(owners[concept] for concept in some))
        true[[place[category] for category in having], j] = True
    return true[[place[category] for category in categories]]
