"""The rules of a good concept bank, and one function that lists every place where a bank breaks them."""
from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from itertools import combinations

import pandas as pd
import torch

from dealkit.concepts.bank import ConceptBank
from dealkit.concepts.words import ENGLISH, FOREIGN, LOOKS, NON_VISUAL

MAX_WORDS = 5      # a concept is a short phrase; DEAL's own prompt asks for at most five words
RULES = ("count", "empty", "length", "language", "non-visual", "name leak", "duplicate", "near-duplicate", "shared")

_SAME = {"bill": "beak", "gray": "grey", "color": "colour", "behavior": "behaviour", "savory": "savoury",
         "recognizable": "recognisable", "feet": "foot"}
_FILLERS = frozenset(("a", "an", "the", "its", "of", "on", "in", "with", "and"))


def check_concepts(bank: Mapping[str, list[str]], *, count: int | None = None, max_words: int = MAX_WORDS,
                   max_share: float = 0.5, vlm=None, max_similarity: float = 0.95) -> pd.DataFrame:
    """List every place where a bank breaks a rule: one row a violation, no rows for a good bank.

    Rules: `count` (as many concepts as expected), `empty` (not blank), `length` (at most `max_words` words),
    `language` (English: no letters of another script, no little words of another language, and frequent English words
    in at least a quarter of four or more phrases), `non-visual` (no word of `NON_VISUAL`, and nothing that is said to
    be missing: a map of "tailless rump" would look for a tail), `name leak` (no word of the category's name, unless it
    names a colour, a shape or a part), `duplicate` and `near-duplicate` (within a category: the same words, or all
    words of one inside the other; case, order, plurals, fillers and spelling variants do not count; with a `vlm` also
    two phrases whose text embeddings have a cosine above `max_similarity`), `shared` (not found in more than
    `max_share` of the categories, where it could not tell them apart; in a bank of hundreds this strikes seldom).

    Args:
        bank: a `ConceptBank` or any mapping from category to a list of concepts.
        count: concepts expected in each category; default: the bank's `provenance["count"]`, else its most frequent
            number.
        max_words: longest concept allowed, in words; a hyphenated word counts as one.
        max_share: largest share of the categories that may hold one concept, in (0, 1]. The default is a half: a
            question that is true of half of the categories is the most useful one, beyond it it says less and less.
        vlm: a model with `encode_text`, whose text tower then judges near-duplicates as well. DEAL cannot draw two
            maps apart whose texts the model does not tell apart.
        max_similarity: largest cosine allowed between two concepts of a category, in (-1, 1]. What is much depends on
            the text tower, so look at the cosines of your own before you lower it.

    Returns:
        DataFrame with the columns category, concept, rule, detail, in the order of the bank. `concept` is "" where the
        rule is about the whole category.

    Raises:
        ValueError: an empty bank, or a limit that makes no sense.

    Example:
        >>> bank = {"wren": ["cocked tail", "loud song"], "crow": ["black wing", "thick beak"]}
        >>> check_concepts(bank)["rule"].tolist()
        ['non-visual']
    """
    if not isinstance(bank, ConceptBank):
        bank = ConceptBank("unnamed", bank)      # refuses an empty bank and anything but lists of strings
    if count is None:
        most_frequent = Counter(map(len, bank.values())).most_common(1)[0][0]
        count = bank.provenance.get("count", max(most_frequent, 1))
    limits = (count, max_words, max_share, max_similarity)
    if not (isinstance(count, int) and count >= 1 <= max_words and 0 < max_share <= 1 and -1 < max_similarity <= 1):
        raise ValueError("expected a whole count >= 1, max_words >= 1, max_share in (0, 1] and max_similarity in "
                         f"(-1, 1], got {', '.join(map(repr, limits))}")
    embedding = _embed(bank, vlm) if vlm is not None else None
    holders = Counter(key for phrases in bank.values() for key in {_words(phrase) for phrase in phrases})
    rows = []
    for category, phrases in bank.items():
        if len(phrases) != count:
            rows.append((category, "", "count", f"{len(phrases)} concepts, expected {count}"))
        english = sum(not ENGLISH.isdisjoint(_all_words(phrase)) for phrase in phrases)
        if len(phrases) >= 4 and english < len(phrases) / 4:
            rows.append((category, "", "language", f"not English: common words in only {english} of {len(phrases)}"))
        repeats = _repeats(phrases, embedding, max_similarity)
        for j, phrase in enumerate(phrases):
            faults = _phrase_faults(category, phrase, max_words) + repeats.get(j, [])
            n = holders[_words(phrase)]
            if n > 1 and n / len(bank) > max_share and phrase.strip():
                faults.append(("shared", f"in {n} of {len(bank)} categories, at most {max_share:.0%} allowed"))
            rows += [(category, phrase, *fault) for fault in faults]
    return pd.DataFrame(rows, columns=["category", "concept", "rule", "detail"])


def _phrase_faults(category: str, phrase: str, max_words: int) -> list[tuple[str, str]]:
    """What is wrong with one phrase by itself, as (rule, detail)."""
    if not phrase.strip():
        return [("empty", "blank")]
    faults = []
    if len(phrase.split()) > max_words:
        faults.append(("length", f"{len(phrase.split())} words, at most {max_words} allowed"))
    words = _all_words(phrase)
    foreign = [word for word in re.findall(r"[^\W\d_]+", phrase) if word.casefold() in FOREIGN or _not_latin(word)]
    if foreign:
        faults.append(("language", f"not English: {', '.join(foreign)}"))
    unseen = [word for word in words if word in NON_VISUAL or _absent(word)]
    if unseen:
        faults.append(("non-visual", f"cannot be pointed at: {', '.join(unseen)}"))
    name = _all_words(category)
    leaked = [word for word in words if word in name and _look(word) not in LOOKS]
    if not leaked and name and f" {' '.join(name)} " in f" {' '.join(words)} ":
        leaked = name      # a name made of looks only ("Black Wing") is given away when it stands there in full
    if leaked:
        faults.append(("name leak", f"word of the category's name: {', '.join(leaked)}"))
    return faults


def _repeats(phrases: list[str], embedding: dict | None, max_similarity: float) -> dict[int, list[tuple[str, str]]]:
    """Positions of the phrases that repeat an earlier one of the same category -> [(rule, detail)]."""
    faults = {}
    for (_, first), (j, second) in combinations(enumerate(phrases), 2):
        a, b = _words(first), _words(second)
        if a and a == b:
            faults[j] = [("duplicate", f"says the same as {first!r}")]
        elif a and b and (a < b or b < a):
            faults.setdefault(j, [("near-duplicate", f"overlaps with {first!r}")])
        elif a and b and embedding:
            cosine = float(embedding[first] @ embedding[second])
            if cosine > max_similarity:
                faults.setdefault(j, [("near-duplicate", f"cosine {cosine:.2f} with {first!r}")])
    return faults


def _embed(bank: Mapping[str, list[str]], vlm) -> dict:
    """phrase -> unit embedding [D], on the CPU, 256 phrases at a time."""
    phrases = sorted({phrase for phrases in bank.values() for phrase in phrases if phrase.strip()})
    with torch.no_grad():
        return {phrase: row for start in range(0, len(phrases), 256)
                for phrase, row in zip(phrases[start:start + 256], vlm.encode_text(phrases[start:start + 256]).cpu())}


def _not_latin(word: str) -> bool:
    return any(not unicodedata.name(letter, "").startswith("LATIN") for letter in word if letter.isalpha())


def _all_words(phrase: str) -> list[str]:
    """Lower-case words in the singular and in one spelling; underscores and hyphens separate words."""
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)?", phrase.casefold().replace("\u2019", "'"))
    return [_SAME.get(word, word) for word in map(_singular, words)]


def _words(phrase: str) -> frozenset[str]:
    """What a phrase says, for comparison with other phrases."""
    return frozenset(_all_words(phrase)) - _FILLERS


def _singular(word: str) -> str:
    word = word.removesuffix("'s")
    if word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def _absent(word: str) -> bool:
    """"tailless", "without", "unmarked": what is missing cannot be pointed at. (Stainless steel can.)"""
    return (word in ("without", "no", "not", "lacking", "absent") or word.endswith("less") and word != "stainless"
            or word.startswith("un") and word.endswith("ed") and not word.startswith("under"))


def _look(word: str) -> str:
    """"winged" -> "wing": the form under which `LOOKS` lists a word."""
    return word if word in LOOKS else word.removesuffix("ed")
