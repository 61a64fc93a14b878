"""Copies what callers pass for a chat template into plain JSON values, and counts its text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from medusa_profiles.profile import shown

from medusa_runtime.errors import PromptError
from medusa_runtime.tokenizer import check_unicode

MAX_BITS = 1024  # of an integer, as many as of a float
MAX_DEPTH = 64  # lists and mappings inside one another
MAX_VALUES = 1 << 20  # values of one prompt, so that lists that contain one list many times end, too


class JsonCopier:
    """Copies mappings and sequences into dicts and lists of JSON's types, as one process hands them to another.

    Attributes:
        characters: Number of characters of all texts that were copied, keys of mappings included.
    """

    def __init__(self) -> None:
        self.characters = 0
        self._values = 0

    def copy(self, what: str, value: object, depth: int = 0) -> Any:
        """Return a copy of a value; `what` names it in error messages.

        Raises:
            PromptError: It holds a value that JSON cannot represent, a text that is not valid Unicode, or too many
                values.
        """
        self._values += 1
        if self._values > MAX_VALUES or depth > MAX_DEPTH:
            raise PromptError(
                f"{what} holds more than {MAX_VALUES} values, or lists and mappings more than {MAX_DEPTH} deep; "
                "shorten it"
            )
        if value is None or (isinstance(value, int) and value.bit_length() <= MAX_BITS):
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, float) and math.isfinite(value):
            return value
        if isinstance(value, Mapping):
            return {self._key(what, key): self.copy(what, one, depth + 1) for key, one in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
            return [self.copy(what, one, depth + 1) for one in value]
        raise PromptError(
            f"{what} holds a value that JSON cannot represent: {shown(value)}, of type {type(value).__name__}; "
            "expected texts, finite numbers, booleans, None, lists and mappings: pass these only"
        )

    def _key(self, what: str, key: object) -> str:
        if not isinstance(key, str):
            raise PromptError(
                f"{what} holds a mapping with the key {shown(key)}, of type {type(key).__name__}; expected texts as "
                "keys, as JSON has them"
            )
        return self.text(key)

    def text(self, text: str) -> str:
        """Count a text and return it; raise PromptError if it is not valid Unicode."""
        self.characters += len(text)
        check_unicode(text)
        return str.__str__(text)  # of an enumeration's member, its value
