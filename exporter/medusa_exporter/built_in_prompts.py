"""Prompts for `verify` and `compare` where no file of prompts is given: several turns, languages and lengths."""

from __future__ import annotations

_ENTRY = "The {0} ferry left the north quay at {0} past nine with timber, salt and eleven passengers on board. "
BUILT_IN_PROMPTS: tuple[tuple[str, ...], ...] = (
    ("Describe the smell of a bakery at dawn in three sentences.", "Now say it as a single line of a poem."),
    ("Write a Python function that returns the second largest number of a list, without sorting it.",),
    ("List five things to check before a long bicycle tour, one per line, numbered.",),
    ("Explique en français pourquoi les feuilles des arbres changent de couleur en automne.",),
    ("What is 17 + 25? Answer with the number alone.",),
    (  # more tokens than one prefill step takes
        "Here is a harbour log.\n"
        + "".join(_ENTRY.format(word) for word in ("first", "second", "third", "fourth", "fifth") * 4)
        + "\nSum up the log in one sentence.",
    ),
)
