"""Prints prompts that ask to change a piece of code: functions of this project, each with a small request.

    python benchmarks/code_edit_prompts.py --limit 40 > code_edit.jsonl

Answers repeat most of the code, as they do in editors; what drafts from the text gain there is measured with them
(`benchmarks/drafts.py`). The order is shuffled with a fixed seed.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("profiles", "runtime", "exporter")
LINES = range(12, 36)
MOST_CHARACTERS = 1500
REQUESTS = (
    "Rename `{name}` to `{name}_v2` and change nothing else. Return the whole code.",
    "Add a line that logs the call with `logging.debug` at the beginning of `{name}`. Return the whole changed code.",
    "Remove the docstring of `{name}` and keep everything else. Return the whole code.",
    "Shorten the comments and keep the code as it is. Return the whole code.",
    "Add a parameter `verbose: bool = False` to `{name}`. Return the whole code.",
)


def pieces() -> Iterator[tuple[str, str]]:
    """Yield the name and the source of every function and class of a suitable length."""
    for file in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                code = ast.get_source_segment(source, node) or ""
                if code.count("\n") + 1 in LINES and len(code) <= MOST_CHARACTERS:
                    yield node.name, code


def main() -> None:
    """Parse the command line and print the prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=40, help="Number of prompts (default: %(default)s).")
    options = parser.parse_args()
    found = list(pieces())
    random.Random(0).shuffle(found)  # noqa: S311 -- a fixed order
    for number, (name, code) in enumerate(found[: options.limit]):
        request = REQUESTS[number % len(REQUESTS)].format(name=name)
        turns = [f"{request}\n\n```python\n{code}\n```"]
        print(json.dumps({"id": f"edit-{number}", "category": "code_editing", "turns": turns}))


if __name__ == "__main__":
    main()
