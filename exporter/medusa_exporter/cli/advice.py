"""Replaces advice for Python programs in messages of the runtime by advice for the command line."""

from __future__ import annotations

import re

_ADVICE = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"pass raw=True, or --raw on the command line", "pass --raw"),
        (r"pass raw=False to use the chat template", "leave out --raw to use the chat template"),
        (r"pass sanitize=False", "leave out --sanitize"),
        (r"or continue_final_message=False", "or leave out --continue-final-message"),
        (r"expected n=1,", "expected --n 1,"),
        (r"\bjson of structured_outputs\b", "--json-schema"),
        (r"\b(regex|choice|grammar) of structured_outputs\b", r"--\1"),
        (r", as a mapping or as JSON text", ", an object"),
        (r": None allows all", ": leave it out to allow all"),
        (r"\bor None in a message\b", "or null in a message"),
        (r", or None\b", ", or leave it out"),
        (r"\bbooleans, None, lists and mappings\b", "booleans, null, lists and objects"),
        (r": pass an? (bool|dict|float|int|list|str)\b( that is not empty)?", ""),
    )
)


def for_command_line(message: str) -> str:
    """Return a message of the runtime with the names of options and JSON values in place of Python's."""
    for pattern, replacement in _ADVICE:
        message = pattern.sub(replacement, message)
    return message
