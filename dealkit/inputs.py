"""What evaluation and training ask of a data set and of a bank: names for its labels, and lists of one length."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence


def category_names(dataset) -> list[str]:
    """The name of each label.

    Raises:
        TypeError: the data set has no `categories`; a torch `Subset` hides those of the data set inside it.
    """
    return _named(dataset, "categories", "the name of each label")


def part_names(dataset) -> list[str]:
    """The name of each of the part masks or points.

    Raises:
        TypeError: the data set has no `parts`.
    """
    return _named(dataset, "parts", "the name of each mask or point of a part")


def concept_lists(bank: Mapping[str, Sequence[str]], categories: Sequence[str]) -> tuple[dict[str, list[str]], int]:
    """The concepts of each category, cut to one number K, which is that of the shortest list.

    Every image of a batch needs as many maps as the others. Where that leaves concepts out, one warning says how many
    categories it concerns.

    Returns:
        (category -> K concepts, K).

    Raises:
        KeyError: a category is missing from the bank.
        ValueError: a category has no concepts.
    """
    lists = {category: list(bank[category]) for category in categories}
    for category, concepts in lists.items():
        if not concepts:
            raise ValueError(f"the bank has no concepts for {category!r}; expected at least one for every category.")
    k = min(map(len, lists.values()))
    longer = [category for category, concepts in lists.items() if len(concepts) > k]
    if longer:
        shortest = next(category for category, concepts in lists.items() if len(concepts) == k)
        warnings.warn(f"{len(longer)} of {len(lists)} categories have more concepts than {shortest!r} with its {k} "
                      f"({', '.join(longer[:3])}{', ...' if len(longer) > 3 else ''}): only the first {k} of each list "
                      "are used. Give every category the same number, the most important ones first.", stacklevel=3)
    return {category: concepts[:k] for category, concepts in lists.items()}, k


def _named(dataset, attribute: str, meaning: str) -> list[str]:
    names = getattr(dataset, attribute, None)
    if names is None:
        kind, inner = type(dataset).__name__, getattr(dataset, "dataset", None)
        remedy = f"Set dataset.{attribute} = [...] before you pass it on."
        if hasattr(inner, attribute):
            remedy = (f"A {kind} does not pass on the attributes of the {type(inner).__name__} inside it: for name in "
                      "('categories', 'parts', 'concept_options'), set subset.name = subset.dataset.name where there "
                      "is one.")
        raise TypeError(f"the data set, a {kind}, has no `{attribute}`; expected a list of str, {meaning}. {remedy}")
    return list(names)
