"""Controls: would the maps look as good if the concept were wrong, or if the model had learnt nothing?

A map of another species' concept that lands on the part as often as the right one says that the maps follow the part's
name, or the bird, and not the concept. A map that stays the same when the weights are replaced by noise is a picture
of the image, not of the model. Maps that look at nothing are in `dealkit.evaluation`: random, centre and uniform.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from dealkit import metrics
from dealkit.evaluation import evaluate
from dealkit.inputs import category_names, concept_lists
from dealkit.maps import embed_texts, explain
from dealkit.models import VLM

# a tower's blocks, as every library names them: transformer.resblocks.3., trunk.stages.0., layer2., encoder.layer.5.
_BLOCK = re.compile(r"^(?:.*?\.)?(?:resblocks|blocks|stages|layers?)\.?\d+(?=\.)")


def wrong_concepts(bank: Mapping[str, Sequence[str]], categories: Sequence[str],
                   shift: int = 0) -> dict[str, list[str]]:
    """For every category, the concepts of another one: the one that has the fewest in common with it.

    Among equals it is the next in the list. Several categories may get the same one's concepts.

    Args:
        bank: mapping from category to concepts.
        categories: at least two, all in the bank.
        shift: how far the lists are moved round, so that concept i of a category meets concept i + shift of the other.
            In Birdworld, where the lists name the same parts in the same order, 0 is the same part in another colour
            and 1 to 4 are other parts.

    Returns:
        category -> K concepts, K being the length of the shortest list.

    Raises:
        KeyError: a category is missing from the bank.
        ValueError: fewer than two categories, or all have the same concepts.

    Example:
        >>> bank = {"wren": ["short tail", "brown wing"], "crow": ["black beak", "black wing"]}
        >>> wrong_concepts(bank, list(bank))
        {'wren': ['black beak', 'black wing'], 'crow': ['short tail', 'brown wing']}
    """
    lists, k = concept_lists(bank, categories)
    own = {category: set(concepts) for category, concepts in lists.items()}
    wrong, names = {}, list(lists)
    for i, category in enumerate(names):
        others = names[i + 1:] + names[:i]
        if all(own[other] == own[category] for other in others):
            raise ValueError(f"no category has other concepts than {category!r}; a wrong concept needs at least two "
                             f"categories that differ, and there are {len(names)} in all.")
        other = min(others, key=lambda name: len(own[category] & own[name]))      # min keeps the first of equals
        wrong[category] = [lists[other][(j + shift) % k] for j in range(k)]
    return wrong


def evaluate_wrong_concepts(vlm, dataset, bank, shift: int = 0, **options) -> pd.Series:
    """The row of `evaluate` for maps of wrong concepts, held against the masks of the right ones.

    How much of the localization would any concept get? Read it beside the row of the right concepts: only the
    difference is knowledge of the concept. The accuracies are the model's own, as ever.

    Args:
        vlm, dataset, bank, options: as `evaluate`. shift: as `wrong_concepts`.

    Source: the wrong class as a control is common; see the "random logit" test of Sixt et al., ICML 2020.
    """
    lists, _ = concept_lists(bank, category_names(dataset))         # cut here, so that what is left out is said once
    return evaluate(vlm, dataset, lists, explained=wrong_concepts(lists, list(lists), shift), **options)


def randomised(vlm: VLM, seed: int, depth: int | None = None) -> VLM:
    """A copy whose image tower has forgotten what it learnt, from the top down; the texts keep their meaning.

    Every tensor of the chosen layers is replaced by normal noise of its own mean and standard deviation, so that
    signals keep about the size that the other layers are used to and maps do not die for want of scale. The running
    statistics of their batch normalisations are taken anew, on noise.

    Args:
        vlm: stays as it is.
        seed: of the noise. One seed gives one tower: depth d + 1 has the noise of depth d and that of one more layer.
        depth: how many of `tower_layers` are replaced, counted from the top; 0 is a plain copy, None replaces all.

    Returns:
        A new VLM in eval mode, on the same device.

    Raises:
        ValueError: a depth that the tower does not have.

    Source: cascading model randomisation, Adebayo et al., "Sanity checks for saliency maps", NeurIPS 2018.

    Example:
        >>> rank = metrics.rank_correlation(explain(vlm, images, texts), explain(randomised(vlm, 0), images, texts))
    """
    layers = list(tower_layers(vlm).values())
    depth = len(layers) if depth is None else depth
    if not 0 <= depth <= len(layers):
        raise ValueError(f"depth is {depth}; this tower has {len(layers)} layers to replace: "
                         f"{', '.join(tower_layers(vlm))}. Expected 0 to {len(layers)}, or None for all.")
    copied = copy.copy(vlm)
    copied.__dict__.pop("tower", None)      # the cut is cached, and belongs to the model it was made for
    copied.model = copy.deepcopy(vlm.model).eval()
    visual, generator = copied.model.visual, torch.Generator().manual_seed(seed)
    parameters = dict(visual.named_parameters())
    replaced = [name for layer in layers[:depth] for name in layer]
    with torch.no_grad():
        for name in replaced:
            weight = parameters[name]
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.copy_(weight.mean() + weight.std(correction=0) * noise)
        _take_statistics(visual, set(replaced), torch.randn(8, 3, *vlm.image_size, generator=generator))
    return copied


def tower_layers(vlm: VLM) -> dict[str, list[str]]:
    """The image tower's weights from the top down: "head", its blocks, "stem", each with the names of its parameters.

    What stands between two blocks belongs to the lower one. A tower without blocks is one layer, "stem".
    """
    names = [name for name, _ in vlm.model.visual.named_parameters()]
    # Parameters are registered in the order in which they are used; open_clip's last projection alone stands too early.
    names.sort(key=lambda name: name == "proj")
    blocks = [match and match.group() for match in map(_BLOCK.match, names)]
    last = max((i for i, block in enumerate(blocks) if block), default=len(names))
    layers, current = {"stem": []}, "stem"
    for i, (name, block) in enumerate(zip(names, blocks)):
        current = "head" if i > last else block or current
        layers.setdefault(current, []).append(name)
    return {name: layers[name] for name in reversed(layers) if layers[name]}


def randomisation_table(vlm: VLM, images: Tensor, texts: Sequence[str] | Sequence[Sequence[str]] | Tensor,
                        seeds: Iterable[int] = (0,), explainer=explain) -> pd.DataFrame:
    """How alike are the maps of a model and of its randomised copies, layer by layer from the top?

    A method that explains the model ends near 0. One that ends far above 0 shows the image whatever the weights are.

    Args:
        vlm: the model. images, texts: as `explain`.
        seeds: one cascade of copies for each.
        explainer: (vlm, images, embeddings) -> maps `[B, K, h, w]`; by default `explain` with the tower's own method.

    Returns:
        One row a seed and depth: seed, depth, layer (the last that was replaced; "none" at depth 0), rank_correlation
        (mean over images and concepts), dead_maps (their share; they have no correlation and are left out of the mean).
    """
    with torch.no_grad():
        text_emb = embed_texts(vlm, texts, len(images))
    maps = explainer(vlm, images, text_emb)
    rows = []
    for seed in seeds:
        for depth, layer in enumerate(["none", *tower_layers(vlm)]):
            others = explainer(randomised(vlm, seed, depth), images, text_emb)
            rows.append((seed, depth, layer, metrics.rank_correlation(maps, others), metrics.dead_maps(others)))
    return pd.DataFrame(rows, columns=["seed", "depth", "layer", "rank_correlation", "dead_maps"])


def _take_statistics(visual: nn.Module, replaced: set[str], images: Tensor) -> None:
    """Give the batch normalisations whose weights were replaced the statistics of what they now see."""
    norms = [module for name, module in visual.named_modules()
             if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.weight" in replaced]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None        # the plain mean of what is seen
        norm.train()
    visual(images.to(next(visual.parameters())))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
        norm.eval()
