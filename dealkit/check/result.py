"""The frame of every check: an answer goes in, a `Result` comes out, and nothing in the answer can crash it."""
from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import torch


@dataclass(frozen=True)
class Hint:
    """What a check noticed: the short name of the mistake, and what to tell the student about it."""

    mistake: str
    text: str


@dataclass(frozen=True)
class Result:
    """What `dealkit.check.ex_NN_k(answer)` returns: shown as a sentence in a notebook, true when the answer is right.

    `mistake` is the short name of what went wrong: "" when nothing did, "start" for an answer that is still empty,
    "error" for one that stopped with an exception, "other" for a wrong answer that no hint recognises.
    """

    exercise: str
    passed: bool
    mistake: str
    text: str

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        said = f"{self.exercise}: {'right.' if self.passed else 'not yet.'} {self.text}"
        return "\n".join(fill(line, 100, break_on_hyphens=False) for line in said.split("\n"))


class _Blank(Exception):
    """The answer is still the `...` of the exercise."""


class _Stopped(Exception):
    """The student's code raised an exception, which is the cause of this one; the message says where, and on what."""


def exercise(start: str, right: str) -> Callable[[Callable[[Any], Hint | None]], Callable[[Any], Result]]:
    """Turn a function that looks for mistakes into a check.

    Args:
        start: what to say about an empty answer: the first step.
        right: what to say about a right one: what it shows.

    Returns:
        A decorator for `check(answer) -> Hint or None` (None: right). The first line of its docstring says what an
        answer is; it is quoted when the answer has another form.
    """
    def decorate(check: Callable[[Any], Hint | None]) -> Callable[[Any], Result]:
        @functools.wraps(check)
        def checked(answer: Any) -> Result:
            name = check.__name__
            wanted = (check.__doc__ or "").strip().splitlines()[0]
            try:
                if _is_blank(answer):
                    raise _Blank
                hint = check(answer)
            except _Blank:
                return Result(name, False, "start", start)
            except _Stopped as stop:
                cause = stop.__cause__
                return Result(name, False, "error", f"Your code stopped{stop}: {type(cause).__name__}: {cause}")
            except Exception as error:                           # the form of the answer, not its value, is wrong
                return Result(name, False, "error", f"This answer cannot be read ({type(error).__name__}: {error}). "
                                                    f"Wanted: {wanted}")
            return Result(name, False, hint.mistake, hint.text) if hint else Result(name, True, "", right)
        return checked
    return decorate


def call(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """The student's function on some arguments: an exception in it, or an empty body, becomes a message."""
    if not callable(function):
        raise TypeError(f"a function was expected, not {type(function).__name__}")
    try:
        value = function(*args, **kwargs)
    except NotImplementedError:
        raise _Blank from None
    except Exception as error:
        code = getattr(function, "__code__", None)               # the last line of the student's, not of what it called
        lines = [frame.line for frame in traceback.extract_tb(error.__traceback__)
                 if code and frame.filename == code.co_filename]
        shapes = ", ".join(str(tuple(x.shape)) for x in args if isinstance(x, torch.Tensor))
        raise _Stopped((f" in the line `{lines[-1]}`" if lines and lines[-1] else "")
                       + (f", on tensors of shape {shapes}" if shapes else "")) from error
    if _is_blank(value):
        raise _Blank
    return value


def same(value: Any, expected: Any, atol: float = 1e-4) -> bool:
    """Whether two numbers or tensors have the same shape and values, up to `atol`."""
    value, expected = (torch.as_tensor(x).detach().double() for x in (value, expected))
    return value.shape == expected.shape and torch.allclose(value, expected, rtol=1e-3, atol=atol)


def other(text: str) -> Hint:
    """The hint of last resort: the answer is wrong, and the check does not know why. Say what to test."""
    return Hint("other", text)


def first(*cases: tuple[str, bool, str]) -> Hint | None:
    """The hint of the first mistake that was seen; a case is (mistake, seen, text)."""
    return next((Hint(mistake, text) for mistake, seen, text in cases if seen), None)


def recognise(value: Any, mistakes: dict[str, tuple], atol: float = 1e-4) -> Hint | None:
    """The hint of the first mistake that gives this value; `mistakes`: its name -> (text, one or more values)."""
    return next((Hint(mistake, text) for mistake, (text, *values) in mistakes.items()
                 if any(same(value, wrong, atol) for wrong in values)), None)


class Watched(dict):
    """A dict that notes in `read` which entries were asked for by name.

    A copy, as by `dict(batch)`, notes nothing: where that matters, ask again with other values and compare.
    """

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default


def _is_blank(value: Any) -> bool:
    return value is None or value is Ellipsis
