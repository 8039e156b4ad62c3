"""The question a language model is asked about a category, and how its reply is read."""
from __future__ import annotations

import ast
import json
import re

from dealkit.concepts.checks import MAX_WORDS

_MARKER = re.compile(r"^\s*(?:[-*+\u2022\u2013\u2014]|\(?\d{1,3}[.):]|\(?[a-zA-Z][.)])\s+")      # "- ", "3. ", "(b) "
_BEFORE_EXPLANATION = re.compile(r"^(.+?)(?:[:;,.]\s|\s[-\u2013\u2014]\s|\s\()")      # "black cap: a dark patch ..."


def concept_prompt(category: str, n: int = 6, domain: str = "photographs") -> str:
    """The question to a language model: which visible features tell this category apart?

    The idea is the paper's (an LLM names the concepts, no human labels them); the wording is our own.

    Args:
        category: name of the category.
        n: number of features asked for.
        domain: what the pictures are, e.g. "photographs of birds" or "satellite images, 10 m a pixel".

    Returns:
        The prompt; the model should answer with a JSON list of `n` strings.

    Raises:
        ValueError: a blank category or domain, or n below 1.

    Example:
        >>> print(concept_prompt("Laysan Albatross").splitlines()[0])
        In photographs, which 6 visible features tell "Laysan Albatross" apart from similar categories?
    """
    if not category.strip() or not domain.strip() or n < 1:
        raise ValueError(f"expected a category, a domain and n >= 1, got {category!r}, {domain!r} and {n}")
    name = json.dumps(" ".join(category.split()), ensure_ascii=False)     # quoted: a name is data, not an instruction
    return f"""In {domain}, which {n} visible features tell {name} apart from similar categories?
Each feature names one part or region and how it looks, for example "black cap" or "deeply forked tail".
- Only what can be pointed at in the picture: no behaviour, sound, taste, habitat, origin or praise.
- Each feature about another place, as far as possible; no two that say the same.
- At most {MAX_WORDS} words each, in English, without any word of the name.
- The most telling feature first.
Answer with a JSON list of {n} strings and nothing else."""


def parse_concepts(reply: str) -> list[str]:
    """Read the concepts from the reply of a language model.

    Understood are JSON lists (alone, in a fence, inside an object, with prose around them), numbered and bulleted
    lists, one concept a line, and a single line with at least three concepts between commas. Markers, quotes,
    emphasis, a full stop at the end and a capital at the beginning go; an explanation behind a concept goes where the
    line would else be too long. Nothing else is repaired: too many, too few or bad concepts stay for `check_concepts`.

    Args:
        reply: the text as it came.

    Returns:
        The concepts in the order of the reply.

    Raises:
        TypeError: the reply is not a string.
        ValueError: no list of strings in it.

    Example:
        >>> parse_concepts("Sure! Here they are:\\n1. **Black cap**\\n2. Forked tail.")
        ['black cap', 'forked tail']
    """
    if not isinstance(reply, str):
        raise TypeError(f"expected the reply as a string, got {type(reply).__name__}; pass the text of the message")
    # Some models think aloud first; where the server's template opens the tag, only its end is in the reply.
    reply = re.sub(r"^.*</think>", "", reply, flags=re.DOTALL)
    found = _from_json(reply) or _from_lines(reply)
    concepts = [concept for concept in map(_clean, found) if concept]
    if not concepts:
        raise ValueError(f"no list of concepts in the reply, which begins {reply.strip()[:60]!r}: it may be empty, a "
                         "refusal, or cut off. Ask again for a JSON list of strings.")
    return concepts


def _from_json(reply: str) -> list[str]:
    """The longest list of strings in the text, the last of equals (an example may stand before the answer).

    JSON, or Python with its single quotes and trailing comma. All lists of an object count as one.
    """
    value, _ = _decode(reply, reply.find("{"))
    lists = [item for item in value.values() if _is_list(item)] if isinstance(value, dict) else []
    if lists:
        return sum(lists, [])
    found, position = [], reply.find("[")
    while position >= 0:
        value, end = _list_at(reply, position)
        if _is_list(value) and len(value) >= len(found):
            found = value
        position = reply.find("[", end if _is_list(value) else position + 1)
    return found


def _is_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _decode(reply: str, position: int) -> tuple[object, int | None]:
    """The JSON value that begins at a position, and where it ends; None where there is none."""
    try:
        return json.JSONDecoder().raw_decode(reply, position) if position >= 0 else (None, None)
    except ValueError:
        return None, None


def _list_at(reply: str, position: int) -> tuple[object, int | None]:
    value, end = _decode(reply, position)
    if end is not None:
        return value, end
    end = reply.find("]", position) + 1
    try:
        return ast.literal_eval(reply[position:end]), end      # reads literals only, runs nothing
    except (ValueError, SyntaxError):
        return None, position


def _from_lines(reply: str) -> list[str]:
    if re.search(r"[\[{]\s*[\"'\u201c{}\]]", reply):      # meant to be JSON, but empty or broken: nothing to guess
        return []
    lines = [line for line in reply.splitlines() if line.strip() and not line.strip().startswith("```")]
    marked = [line for line in lines if _MARKER.match(line)]
    if marked:
        return [_MARKER.sub("", line) for line in marked]
    lines = [line for line in lines if not _is_prose(line)]
    if len(lines) == 1 and re.search(r"[,;].*[,;]", lines[0]):
        return re.split(r"[,;]", lines[0].rpartition(":")[2])
    return lines if len(lines) > 1 else []      # a lone line without a marker is more often "No." than a concept


def _is_prose(line: str) -> bool:
    """A line that introduces or closes a list: "Here are six features:", "I hope this helps!", a whole sentence."""
    line = line.strip()
    sentence = line.endswith(".") and len(line.split()) > MAX_WORDS and line.count(",") < 2
    return line.startswith("#") or line.endswith((":", "!", "?")) or sentence


def _clean(text: str) -> str:
    text = " ".join(re.sub(r"\*\*|__|`", "", text).split())
    explained = _BEFORE_EXPLANATION.match(text)
    if explained and len(text.split()) > MAX_WORDS and " " in explained[1]:
        text = explained[1]      # but not "bill: long, pink ...": a bare part would have lost its look
    text = text.strip(" \"'\u201c\u201d\u2018\u2019.,;:*_")
    return text[:1].lower() + text[1:] if text[1:2].islower() or text[1:2] == " " else text      # but "V-shaped tail"
