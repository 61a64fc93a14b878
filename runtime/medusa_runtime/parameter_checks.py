"""Checks of the values of sampling parameters: each returns the value in its normal form, or raises ArgumentError."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from medusa_profiles.profile import shown

from medusa_runtime.arguments import as_int
from medusa_runtime.errors import ArgumentError

MAX_TEXTS = 256  # stop strings, and bad words, of one request
MAX_TEXT_LENGTH = 1024  # characters of each of them
MAX_BIAS = 100.0
JSON_ID = re.compile(r"[0-9]{1,10}")  # a token id as the key of a JSON object


def as_float(what: str, value: object) -> float:
    """Return any number as a float, inf if it is too large; raise ArgumentError for other types, bool included."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Real, np.floating, np.integer)):
        raise ArgumentError(f"{what} is {value!r:.80}, of type {type(value).__name__}; expected a number: pass a float")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def as_number(what: str, value: object, least: float, most: float) -> float:
    """Return a finite number from `least` to `most` as a float; raise ArgumentError otherwise, for bool too."""
    number = as_float(what, value)
    if not (least <= number <= most and math.isfinite(number)):
        bounds = f"a finite number from {least:g} up" if most == math.inf else f"a number from {least:g} to {most:g}"
        raise ArgumentError(f"{what} is {number}; expected {bounds}")
    return number


def as_int_between(what: str, value: object, least: int, most: int) -> int:
    """Return an integer from `least` to `most`; raise ArgumentError otherwise."""
    number = as_int(what, value, least)
    if number > most:
        raise ArgumentError(f"{what} is {shown(number)}; expected at most {most}: pass a smaller one")
    return number


def as_collection(what: str, value: object) -> Iterable[object]:
    """Return a collection that is neither a text nor a mapping; raise ArgumentError otherwise."""
    if not isinstance(value, Collection) or isinstance(value, (str, bytes, bytearray, Mapping)):
        raise ArgumentError(f"{what} is {value!r:.80}, of type {type(value).__name__}; expected a list")
    return value


def as_texts(what: str, value: object) -> tuple[str, ...]:
    """Return texts that are not empty, as a tuple; raise ArgumentError otherwise. None is ()."""
    found = tuple(as_collection(what, value) if value is not None else ())
    if len(found) > MAX_TEXTS:
        raise ArgumentError(f"{what} has {len(found)} texts; expected at most {MAX_TEXTS}")
    for text in found:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_TEXT_LENGTH:
            raise ArgumentError(f"{what} holds {text!r:.80}; expected texts of 1 to {MAX_TEXT_LENGTH} characters")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ArgumentError(
                f"{what} holds {text!r:.80}, which is not valid Unicode; expected other texts"
            ) from None
    return found  # type: ignore[return-value]


def as_id_tuple(what: str, value: object) -> tuple[int, ...]:
    """Return token ids as a tuple; raise ArgumentError otherwise. None is ()."""
    return tuple(as_int(f"a token id in {what}", one, 0) for one in as_collection(what, () if value is None else value))


def as_allowed_ids(value: object) -> tuple[int, ...]:
    """Return token ids as a tuple, at least one; raise ArgumentError otherwise."""
    found = as_id_tuple("allowed_token_ids", value)
    if not found:
        raise ArgumentError("allowed_token_ids is empty; expected at least one token id: None allows all")
    return found


def as_bias(value: object) -> tuple[tuple[int, float], ...]:
    """Return pairs of token ids and numbers, of a mapping whose ids may be texts as in JSON, or of such pairs.

    Raises:
        ArgumentError: It is neither, an id is there twice, or a number is out of range.
    """
    if isinstance(value, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        value = dict(value)
    if not isinstance(value, Mapping):
        raise ArgumentError(
            f"logit_bias is {value!r:.80}, of type {type(value).__name__}; expected a mapping from token ids to numbers"
        )
    found: dict[int, float] = {}
    for key, bias in value.items():
        token = int(key) if isinstance(key, str) and JSON_ID.fullmatch(key) else key
        token = as_int("a token id in logit_bias", token, 0)
        if token in found:
            raise ArgumentError(
                f"logit_bias has the token id {token} twice, as a number and as a text; expected it once"
            )
        found[token] = as_number(f"logit_bias[{token}]", bias, -MAX_BIAS, MAX_BIAS)
    return tuple(found.items())


def as_seconds(what: str, value: object) -> float | None:
    """Return None, or a finite number of seconds above 0; raise ArgumentError otherwise."""
    if value is None:
        return None
    seconds = as_float(what, value)
    if not 0 < seconds < math.inf:
        raise ArgumentError(f"{what} is {shown(value)}; expected a finite number of seconds above 0, or None")
    return seconds
