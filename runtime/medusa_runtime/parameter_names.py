"""Refuses names that are no fields of a class of parameters, with the field that is meant where it is known."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

from medusa_profiles.profile import shown

from medusa_runtime.errors import ArgumentError

Parameters = TypeVar("Parameters", bound=type)

# names of other programs: transformers, OpenAI's API and older versions of vLLM
OTHER_NAMES = {
    "bad_words_ids": "bad_words",
    "do_sample": "temperature, where 0 is greedy decoding",
    "eos_token_id": "stop_token_ids",
    **dict.fromkeys(
        ("guided_choice", "guided_decoding", "guided_grammar", "guided_json", "guided_regex", "response_format"),
        "structured_outputs, with one of the fields json, regex, choice, grammar and json_object,",
    ),
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "random_seed": "seed",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "top_logprobs": "logprobs",
}


def check_names(names: Iterable[object], fields: Collection[str], unsupported: Collection[str]) -> None:
    """Raise ArgumentError for the first name that is no field.

    Args:
        names: The names to check.
        fields: The fields that there are.
        unsupported: Names that are refused because they are not supported, not because they are unknown.
    """
    for name in names:
        if name in fields:
            continue
        if name in unsupported:
            raise ArgumentError(f"{name!r} is a parameter that medusa-export does not support; leave it out")
        if isinstance(name, str) and name in OTHER_NAMES:
            raise ArgumentError(f"unknown parameter {name!r}; expected {OTHER_NAMES[name]} in its place")
        raise ArgumentError(f"unknown parameter {shown(name)}; expected some of {', '.join(sorted(fields))}")


def checked_names(unsupported: Collection[str]) -> Callable[[Parameters], Parameters]:
    """Return a decorator that lets the constructor of a dataclass refuse other names as `check_names` does.

    The constructor keeps its signature. Python's own TypeError would not say which names there are.
    """

    def decorate(kind: Parameters) -> Parameters:
        construct = kind.__init__  # type: ignore[misc]
        fields = {field.name for field in dataclasses.fields(kind)}

        @functools.wraps(construct)
        def checked(self: object, *arguments: Any, **named: Any) -> None:
            check_names(named, fields, unsupported)
            construct(self, *arguments, **named)

        kind.__init__ = checked  # type: ignore[misc]
        return kind

    return decorate
