"""The frame of every check: an answer goes in, a `Result` comes out, and nothing in the answer can crash it."""
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
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
        return f"{self.exercise}: {'right.' if self.passed else 'not yet.'} {self.text}"


class _Blank(Exception):
    """The answer is still the `...` of the exercise."""


class _Stopped(Exception):
    """The student's code raised an exception, which is the cause of this one."""


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
                return Result(name, False, "error", f"Your code stopped with {type(cause).__name__}: {cause}")
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
        raise _Stopped from error
    if _is_blank(value):
        raise _Blank
    return value


def same(value: Any, expected: Any, atol: float = 1e-4) -> bool:
    """Whether two numbers or tensors have the same shape and values, up to `atol`."""
    value, expected = (torch.as_tensor(x).detach().double() for x in (value, expected))
    return value.shape == expected.shape and torch.allclose(value, expected, rtol=1e-3, atol=atol)


def other(text: str) -> Hint:
    """The hint of last resort: the answer is wrong, and the check does not know why. Say what would be right to test."""
    return Hint("other", text)


def _is_blank(value: Any) -> bool:
    return value is None or value is Ellipsis
