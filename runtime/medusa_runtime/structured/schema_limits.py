"""Refuses JSON schemas that would take too much memory to compile, or that change how they are read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal

from medusa_runtime.errors import ArgumentError

MAX_MULTIPLE = 20_000  # the automaton of multiples of it has some 10 MB
MOST_DIGITS = 100  # of a multiple that are looked at: more are too large anyway
_MULTIPLE = "multipleOf"
_OPTIONS = "x-guidance"  # llguidance's own: other white space and separators, keywords that are ignored
_CONTENT = frozenset({"const", "default", "enum", "examples"})  # keywords whose values are documents, not schemas
_ESCAPE = re.compile(r"\\u00([0-7][0-9a-fA-F])")
_IN_GRAMMAR = re.compile(rf'"{_MULTIPLE}"\s*:\s*(-?[0-9][0-9.eE+-]*)')


def check_schema(text: str) -> None:
    """Check a schema before it is compiled.

    Args:
        text: Valid JSON, an object.

    Raises:
        ArgumentError: It has the keyword x-guidance, or multiples that are too large.
    """
    schema = json.loads(text, parse_float=Decimal)
    if _OPTIONS in schema:
        raise ArgumentError(
            f"json of structured_outputs has the keyword {_OPTIONS}, which changes what documents match; expected a "
            "JSON schema: leave it out"
        )
    _check_multiples("json", _multiples(schema))


def check_grammar(text: str) -> None:
    """Check the schemas inside a grammar; raise ArgumentError where their multiples are too large."""
    plain = _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text)
    _check_multiples("grammar", (_number(found) for found in _IN_GRAMMAR.findall(plain)))


def _multiples(schema: object) -> Iterator[Decimal]:
    """Yield the values of multipleOf in a schema and the schemas inside it."""
    waiting = [schema]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            for name, value in one.items():
                if name == _MULTIPLE and isinstance(value, int | Decimal) and not isinstance(value, bool):
                    yield Decimal(value)
                elif name not in _CONTENT:
                    waiting.append(value)
        elif isinstance(one, list):
            waiting += one


def _number(text: str) -> Decimal:
    try:
        return Decimal(text)
    except ArithmeticError:
        return Decimal(0)  # llguidance refuses it


def _check_multiples(kind: str, multiples: Iterator[Decimal]) -> None:
    """Check the least common multiple, without the factors 2 and 5, which cost nothing in decimal digits."""
    common = 1
    for multiple in multiples:
        digits = "".join(map(str, multiple.as_tuple().digits)).rstrip("0") or "0"
        number = int(digits[-MOST_DIGITS:]) + (10**MOST_DIGITS + 1) * (len(digits) > MOST_DIGITS)
        for factor in (2, 5):
            while number and number % factor == 0:
                number //= factor
        common = math.lcm(common, number) if number else common
        if common > MAX_MULTIPLE:
            raise ArgumentError(
                f"{kind} of structured_outputs has {_MULTIPLE} {multiple!s:.40}, with others a common multiple of "
                f"{common} without the factors 2 and 5; expected at most {MAX_MULTIPLE}, as the memory grows with it: "
                "leave it out"
            )
