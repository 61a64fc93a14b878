"""Converts arguments of the public API to their expected types, or raises an error that names the expected one."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from medusa_profiles.profile import shown
from numpy.typing import NDArray

from medusa_runtime.errors import ArgumentError, MedusaError, PromptError


def as_int(what: str, value: object, least: int, error: type[MedusaError] = ArgumentError) -> int:
    """Return an int or numpy integer as an int; raise `error` for other types, bool included, and below `least`."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise error(f"{what} is {value!r:.80}, of type {type(value).__name__}; expected a whole number: pass an int")
    if value < least:
        raise error(f"{what} is {shown(value)}; expected at least {least}: pass a larger one")
    return int(value)


def as_optional_int(what: str, value: object, least: int) -> int | None:
    """Return None, or an integer of at least `least` as an int; raise ArgumentError otherwise."""
    return None if value is None else as_int(what, value, least)


def as_bool(what: str, value: object) -> bool:
    """Return a bool or numpy bool as a bool; raise ArgumentError otherwise."""
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentError(f"{what} is {value!r:.80}, of type {type(value).__name__}; expected True or False")
    return bool(value)


def as_text(what: str, value: object) -> str:
    """Return a str that is not empty; raise ArgumentError otherwise."""
    if not isinstance(value, str) or not value:
        raise ArgumentError(
            f"{what} is {value!r:.80}, of type {type(value).__name__}; expected a name: pass a str that is not empty"
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
        raise ArgumentError(f"{what} is {value!r:.80}, of type {type(value).__name__}; expected a path: pass a str")
    return Path(found)


def as_token_ids(prompt: object, vocabulary: int) -> NDArray[np.int64]:
    """Return a prompt's token ids as an array (N,), N at least 1, each from 0 to `vocabulary` - 1.

    Accepts sequences of int or numpy integers and numpy arrays of any integer type; raises PromptError otherwise.
    """
    if not isinstance(prompt, (Sequence, np.ndarray)) or isinstance(prompt, (str, bytes, bytearray)):
        raise PromptError(
            f"the prompt is {prompt!r:.80}, of type {type(prompt).__name__}; expected one flat list of token ids: "
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
            f"the prompt has token ids outside 0 … {vocabulary - 1}, from {low} to {high}; was another tokenizer used?"
        )
    return np.asarray(prompt, dtype=np.int64)


def as_stop_ids(stop_ids: object) -> frozenset[int]:
    """Return a collection of token ids as a set; raise PromptError otherwise."""
    if not isinstance(stop_ids, Collection) or isinstance(stop_ids, (str, bytes, bytearray)):
        raise PromptError(f"stop_ids is {stop_ids!r:.80}; expected a set or list of token ids, () for none")
    _check_ids("stop_ids", stop_ids)
    return frozenset(int(one) for one in stop_ids)


def _check_ids(what: str, ids: Iterable[object]) -> None:
    for index, one in enumerate(ids):
        if isinstance(one, (bool, np.bool_)) or not isinstance(one, (int, np.integer)):
            raise PromptError(
                f"{what} holds {one!r:.80}, of type {type(one).__name__}, at place {index}; expected one flat list of "
                "token ids, whole numbers"
            )
