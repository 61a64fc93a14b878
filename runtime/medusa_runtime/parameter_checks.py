"""Checks of the values of sampling parameters: each returns the value in its normal form, or raises ArgumentError."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from medusa_profiles.profile import shown

from medusa_runtime.arguments import as_int, read_items
from medusa_runtime.errors import ArgumentError

MAX_TEXTS = 256  # stop strings, and bad words, of one request
MAX_TEXT_LENGTH = 1024  # characters of each of them
MAX_BIAS = 100.0
JSON_ID = re.compile(r"[0-9]{1,10}")  # a token id as the key of a JSON object
_BIAS = "a mapping from token ids to numbers, or a list of such pairs"


def as_float(what: str, value: object) -> float:
    """Return any number as a float, ±inf if it is too large; raise ArgumentError for other types, bool included."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Real, np.floating, np.integer)):
        raise ArgumentError(
            f"{what} is {shown(value)}, of type {type(value).__name__}; expected a number: pass a float"
        )
    try:
        return float(value)
    except OverflowError:
        return -math.inf if value < 0 else math.inf


def as_number(what: str, value: object, least: float, most: float) -> float:
    """Return a finite number from `least` to `most` as a float; raise ArgumentError otherwise, for bool too."""
    number = as_float(what, value)
    if not (least <= number <= most and math.isfinite(number)):
        bounds = f"a finite number from {least:g} up" if most == math.inf else f"a number from {least:g} to {most:g}"
        raise ArgumentError(f"{what} is {number}; expected {bounds}")
    return number


def as_optional_count(what: str, value: object, most: int, minus_one: str) -> int | None:
    """Return None, or an integer from 0 to `most`; raise ArgumentError otherwise.

    Args:
        what: Name of the value.
        value: The value.
        most: Largest integer.
        minus_one: What -1 means in vLLM, and what to pass in its place.
    """
    if isinstance(value, (int, np.integer)) and value == -1:
        raise ArgumentError(f"{what} is -1, which vLLM reads as {minus_one}")
    return None if value is None else as_int(what, value, 0, most=most)


def as_items(what: str, value: object, expected: str) -> tuple[Any, ...]:
    """Return the items of a collection that is neither a text nor a mapping; raise ArgumentError otherwise."""
    found = read_items(value)
    if found is None:
        raise ArgumentError(f"{what} is {shown(value)}, of type {type(value).__name__}; expected {expected}")
    return found


def as_texts(what: str, value: object, expected: str = "a list of texts") -> tuple[str, ...]:
    """Return texts that are not empty, as a tuple; raise ArgumentError otherwise. None is ()."""
    found = () if value is None else as_items(what, value, expected)
    if len(found) > MAX_TEXTS:
        raise ArgumentError(f"{what} has {len(found)} texts; expected at most {MAX_TEXTS}")
    for text in found:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_TEXT_LENGTH:
            raise ArgumentError(f"{what} holds {shown(text)}; expected texts of 1 to {MAX_TEXT_LENGTH} characters")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ArgumentError(
                f"{what} holds {shown(text)}, which is not valid Unicode; expected other texts"
            ) from None
    return tuple(str.__str__(text) for text in found)  # of an enumeration's member or numpy's text, the plain text


def as_id_tuple(what: str, value: object) -> tuple[int, ...]:
    """Return token ids as a tuple; raise ArgumentError otherwise. None is ()."""
    found = () if value is None else as_items(what, value, "a list of token ids")
    return tuple(as_int(f"a token id in {what}", one, 0) for one in found)


def as_allowed_ids(value: object) -> tuple[int, ...]:
    """Return token ids as a tuple, at least one; raise ArgumentError otherwise."""
    found = as_id_tuple("allowed_token_ids", value)
    if not found:
        raise ArgumentError("allowed_token_ids is empty; expected at least one token id: None allows all")
    return found


def as_bias(value: object) -> tuple[tuple[int, float], ...]:
    """Return pairs of token ids and numbers, of a mapping whose ids may be texts as in JSON, or of a list of pairs.

    Raises:
        ArgumentError: It is neither, an id is there twice, or a number is out of range.
    """
    pairs = value.items() if isinstance(value, Mapping) else as_items("logit_bias", value, _BIAS)
    found: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ArgumentError(f"logit_bias holds {shown(pair)}; expected {_BIAS}")
        key, bias = pair
        token = int(key) if isinstance(key, str) and JSON_ID.fullmatch(key) else key
        token = as_int("a token id in logit_bias", token, 0)
        if token in found:
            raise ArgumentError(f"logit_bias has the token id {token} twice; expected it once: remove one of the two")
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
