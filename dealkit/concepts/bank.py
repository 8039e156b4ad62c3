"""`ConceptBank`: categories, their concepts and where these came from, in one JSON file that is never half written."""
from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

from dealkit.paths import data_path

_KEYS = ("name", "concepts", "provenance")


class MissingCategory(KeyError):
    """A category that the bank does not have. A plain KeyError prints the repr of its message, this one the message."""

    def __str__(self) -> str:
        return str(self.args[0])


class ConceptBank(Mapping):
    """Mapping from category to concepts, in the order of the data set's labels, with the record of its making.

    Categories are written as words: "Black footed Albatross", "apple pie", "Annual Crop". A data set's own class name
    finds them too: `bank["001.Black_footed_Albatross"]`, `bank["apple_pie"]`, `bank["AnnualCrop"]`,
    `bank["american_bulldog"]`; see `category_name`. Capitals do not count where no two categories differ by them only.

    Args:
        name: the data set that the bank belongs to.
        concepts: category -> list of short phrases, most important first.
        provenance: how the bank was made: `model`, `prompt`, `date`, `hand_edits`, `note`, and `count`, the number of
            concepts that a category should have. Anything that JSON can hold; nothing is required.

    Raises:
        ValueError: no category at all, or concepts that are not a list of strings.

    Example:
        >>> bank = ConceptBank("birds", {"wren": ["cocked tail", "pale brow"], "crow": ["black wing", "thick beak"]})
        >>> bank["crow"]
        ['black wing', 'thick beak']
    """

    def __init__(self, name: str, concepts: Mapping[str, list[str]], provenance: Mapping | None = None):
        provenance = {} if provenance is None else provenance
        _validate(name, concepts, provenance, where=f"concept bank {name!r}")
        self.name = name
        self.concepts = {category: list(phrases) for category, phrases in concepts.items()}
        # Through JSON and back: a private copy, equal to what a later load returns. Only its keys are sorted, because
        # the order of categories and of concepts has a meaning.
        self.provenance = json.loads(json.dumps(dict(provenance), sort_keys=True, allow_nan=False))

    @property
    def categories(self) -> list[str]:
        """The categories in the order of the data set's labels."""
        return list(self.concepts)

    def __getitem__(self, category: str) -> list[str]:
        key = self._key(category)
        if key is not None:
            return list(self.concepts[key])
        raise MissingCategory(
            f"concept bank {self.name!r} has no category {category!r}{_did_you_mean(category, self.concepts)}; its "
            f"{len(self)} categories are in bank.categories. Use the bank made for this data set, or add the category.")

    def __contains__(self, category: object) -> bool:
        return self._key(category) is not None

    def _key(self, category: object) -> str | None:
        """The category meant by a name: itself, the words behind a class name, or those in other capitals."""
        if category in self.concepts:
            return category
        words = category_name(category)
        if words in self.concepts or not isinstance(words, str):
            return words if words in self.concepts else None
        alike = [name for name in self.concepts if name.casefold() == words.casefold()]
        return alike[0] if len(alike) == 1 else None

    def __iter__(self) -> Iterator[str]:
        return iter(self.concepts)

    def __len__(self) -> int:
        return len(self.concepts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ConceptBank):
            return NotImplemented
        # Lists, because the order of the categories is part of the bank.
        return ((self.name, list(self.concepts.items()), self.provenance)
                == (other.name, list(other.concepts.items()), other.provenance))

    __hash__ = None

    def __repr__(self) -> str:
        return f"ConceptBank({self.name!r}, {len(self)} categories, {sum(map(len, self.concepts.values()))} concepts)"

    @classmethod
    def load(cls, path: str | Path) -> ConceptBank:
        """Read a bank and validate it.

        Args:
            path: a JSON file as `save` writes it.

        Returns:
            The bank.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: names the file, the category and the rule that is broken.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no concept bank at {path}; dealkit.load_concepts(name) opens the shipped ones")
        try:
            data = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_refuse_repeats)
        except ValueError as error:     # bad UTF-8, bad JSON and a repeated key are all ValueErrors
            raise ValueError(f"{path}: rule 'format': {error}; expected UTF-8 JSON as bank.save writes it") from error
        if not isinstance(data, dict) or set(data) != set(_KEYS):
            found = sorted(data) if isinstance(data, dict) else f"a {type(data).__name__}"
            raise ValueError(f"{path}: rule 'format': expected an object with the keys {list(_KEYS)}, found {found}")
        _validate(*(data[key] for key in _KEYS), where=str(path), complete=True)
        return cls(*(data[key] for key in _KEYS))

    def save(self, path: str | Path) -> None:
        """Write the bank as JSON. The same bank gives the same bytes; a failed write leaves the old file as it was.

        Args:
            path: the file to write; missing folders are made.

        Raises:
            ValueError: a category without concepts or a blank concept, which `load` would refuse.
            OSError: the folder is not writable or the disk is full.
        """
        path = Path(path)
        _validate(self.name, self.concepts, self.provenance, where=f"concept bank {self.name!r}", complete=True)
        data = {key: getattr(self, key) for key in _KEYS}
        content = (json.dumps(data, ensure_ascii=False, indent=1) + "\n").encode("utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)     # one step for the file system: a reader sees the old bank or the new one
        except OSError as error:
            error.add_note(f"{path} was left as it was; free disk space or choose a folder that you may write to")
            raise
        finally:
            temporary.unlink(missing_ok=True)


def category_name(class_name: object) -> object:
    """The words behind a data set's class name: no number in front, blanks for underscores, CamelCase taken apart.

    Args:
        class_name: e.g. a folder's name. Anything but a string comes back as it is.

    Returns:
        The category as the shipped banks write it. A name that is already in words is returned unchanged.

    Example:
        >>> [category_name(name) for name in ("001.Black_footed_Albatross", "apple_pie", "AnnualCrop", "pug")]
        ['Black footed Albatross', 'apple pie', 'Annual Crop', 'pug']
    """
    if not isinstance(class_name, str):
        return class_name
    words = re.sub(r"^\d+\.", "", class_name).replace("_", " ").strip()
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words) if " " not in words else words


def load_concepts(name: str) -> ConceptBank:
    """Load a concept bank that is shipped with dealkit.

    Args:
        name: name of the data set, e.g. "birdworld".

    Returns:
        A fresh `ConceptBank`.

    Raises:
        ValueError: no such bank; the message lists those there are.

    Example:
        >>> len(load_concepts("birdworld").categories)
        16
    """
    shipped = sorted(path.stem for path in data_path("concepts").glob("*.json"))
    if name not in shipped:
        raise ValueError(f"no shipped concept bank is called {name!r}{_did_you_mean(name, shipped)}; shipped: "
                         f"{', '.join(shipped)}. A file of your own is opened with ConceptBank.load(path).")
    return ConceptBank.load(data_path("concepts", f"{name}.json"))


def _did_you_mean(word: object, known: Mapping | list[str]) -> str:
    """' (did you mean ...?)' with up to three close names, or nothing. Case and underscores do not count."""
    plain = {name.casefold().replace("_", " "): name for name in known}
    close = get_close_matches(str(word).casefold().replace("_", " "), plain, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(repr(plain[name]) for name in close)}?)" if close else ""


def _refuse_repeats(pairs: list[tuple[str, object]]) -> dict:
    """Build a JSON object, but refuse a key that stands in it twice (json would silently keep the last one)."""
    result = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key!r} stands in the file twice")
        result[key] = value
    return result


def _validate(name: object, concepts: object, provenance: object, where: str, complete: bool = False) -> None:
    """Raise a ValueError that names the place, the category and the rule if this is not a bank.

    `complete` adds what training needs and a file must have. A bank in memory may still be faulty, so that
    `check_concepts` can list all faults at once instead of stopping at the first.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where}: rule 'name': expected the name of the data set as a string, got {name!r}")
    if not isinstance(provenance, Mapping):
        raise ValueError(f"{where}: rule 'provenance': expected a mapping such as {{'model': ...}}, got {provenance!r}")
    try:
        json.dumps(dict(provenance), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: rule 'provenance': {error}; use strings, numbers and lists of them") from error
    if not isinstance(concepts, Mapping) or not concepts:
        raise ValueError(f"{where}: rule 'concepts': expected category -> list of concepts with at least one category, "
                         f"got {'an empty bank' if not concepts else type(concepts).__name__}")
    for category, phrases in concepts.items():
        if not isinstance(category, str) or not category.strip():
            raise ValueError(f"{where}: category {category!r}: rule 'category': expected a name that is not blank")
        here = f"{where}: category {category!r}"
        if not isinstance(phrases, (list, tuple)):
            raise ValueError(f"{here}: rule 'list': expected a list of strings, got {phrases!r}")
        for phrase in phrases:
            if not isinstance(phrase, str):
                raise ValueError(f"{here}: rule 'string': {phrase!r} is not a string; put it in quotes")
            if complete and not phrase.strip():
                raise ValueError(f"{here}: rule 'empty': a concept is blank; delete it or fill it in")
        if complete and not phrases:
            raise ValueError(f"{here}: rule 'count': no concepts; list at least one")
