"""Converts arguments of the public API to their expected types, or raises an error that names the expected one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from medusa_profiles.profile import shown
from numpy.typing import NDArray

from medusa_runtime.errors import ArgumentError, MedusaError, PromptError

MAX_INT = 2**64 - 1  # no argument has a use for a larger number, and Python cannot print one of thousands of digits


def as_int(
    what: str, value: object, least: int, error: type[MedusaError] = ArgumentError, *, most: int = MAX_INT
) -> int:
    """Return an int or numpy integer from `least` to `most` as an int; raise `error` otherwise, for bool too."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise error(f"{what} is {shown(value)}, of type {type(value).__name__}; expected a whole number: pass an int")
    number = int(value)
    if number < least:
        raise error(f"{what} is {shown(number)}; expected at least {least}: pass a larger one")
    if number > most:
        raise error(f"{what} is {shown(number)}; expected at most {most}: pass a smaller one")
    return number


def as_optional_int(what: str, value: object, least: int) -> int | None:
    """Return None, or an integer of at least `least` as an int; raise ArgumentError otherwise."""
    return None if value is None else as_int(what, value, least)


def as_bool(what: str, value: object) -> bool:
    """Return a bool or numpy bool as a bool; raise ArgumentError otherwise."""
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentError(f"{what} is {shown(value)}, of type {type(value).__name__}; expected True or False")
    return bool(value)


def as_text(what: str, value: object) -> str:
    """Return a str that is not empty; raise ArgumentError otherwise."""
    if not isinstance(value, str) or not value:
        raise ArgumentError(
            f"{what} is {shown(value)}, of type {type(value).__name__}; expected a name: pass a str that is not empty"
        )
    return value


def as_optional_text(what: str, value: object) -> str | None:
    """Return None, or a str that is not empty; raise ArgumentError otherwise."""
    return None if value is None else as_text(what, value)


def as_path(what: str, value: object) -> Path:
    """Return a str or a path object as a Path; raise ArgumentError otherwise."""
    try:
        found = os.fspath(value)  # type: ignore[call-overload]
    except TypeError:
        found = None
    if not isinstance(found, str) or not found:
        raise ArgumentError(f"{what} is {shown(value)}, of type {type(value).__name__}; expected a path: pass a str")
    return Path(found)


def as_token_ids(prompt: object, vocabulary: int) -> NDArray[np.int64]:
    """Return a prompt's token ids as an array (N,), N at least 1, each from 0 to `vocabulary` - 1.

    Accepts sequences of int or numpy integers and numpy arrays of any integer type; raises PromptError otherwise.
    """
    if not isinstance(prompt, (Sequence, np.ndarray)) or isinstance(prompt, (str, bytes, bytearray)):
        raise PromptError(
            f"the prompt is {shown(prompt)}, of type {type(prompt).__name__}; expected one flat list of token ids: "
            "encode a text first"
        )
    if isinstance(prompt, np.ndarray) and prompt.ndim != 1:
        raise PromptError(f"the prompt has the shape {prompt.shape}; expected one flat list of token ids")
    if not len(prompt):
        raise PromptError("the prompt is empty: expected at least one token")
    if not isinstance(prompt, np.ndarray):
        _check_ids("the prompt", prompt)
    elif not np.issubdtype(prompt.dtype, np.integer):
        raise PromptError(f"the prompt is an array of {prompt.dtype}; expected one flat list of token ids, integers")
    ends = (prompt.min(), prompt.max()) if isinstance(prompt, np.ndarray) else (min(prompt), max(prompt))
    low, high = map(int, ends)  # checked before they are converted to 64 bits
    if low < 0 or high >= vocabulary:
        raise PromptError(
            f"the prompt has token ids outside 0 … {vocabulary - 1}, from {shown(low)} to {shown(high)}; was "
            "another tokenizer used?"
        )
    return np.asarray(prompt, dtype=np.int64)


def as_stop_ids(stop_ids: object) -> frozenset[int]:
    """Return a collection of token ids as a set; raise PromptError otherwise."""
    ids = read_items(stop_ids)
    if ids is None:
        raise PromptError(f"stop_ids is {shown(stop_ids)}; expected a set or list of token ids, () for none")
    _check_ids("stop_ids", ids)
    return frozenset(int(one) for one in ids)


def read_items(value: object) -> tuple[Any, ...] | None:
    """Return the items of a collection; None for a text, a mapping, and anything else, such as an array of no axes."""
    if isinstance(value, Collection) and not isinstance(value, (str, bytes, bytearray, Mapping)):
        with contextlib.suppress(TypeError):  # an array of no axes has the methods of a collection, but no items
            return tuple(value)
    return None


def _check_ids(what: str, ids: Iterable[object]) -> None:
    for index, one in enumerate(ids):
        if isinstance(one, (bool, np.bool_)) or not isinstance(one, (int, np.integer)):
            raise PromptError(
                f"{what} holds {shown(one)}, of type {type(one).__name__}, at place {index}; expected one flat list of "
                "token ids, whole numbers"
            )
