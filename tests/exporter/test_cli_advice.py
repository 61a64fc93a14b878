"""No message of the runtime that a user of the command line can cause advises what only Python programs can do."""

import ast
import re
from pathlib import Path

import medusa_runtime
import pytest
from medusa_exporter.cli.advice import for_command_line

FOLDER = Path(medusa_runtime.__file__).parent
REACHED = (
    "prompt_encoder", "sanitizer", "template_worker", "final_message", "messages", "json_values", "template_inputs",
    "sampling_params", "parameter_checks", "handle", "chat_template",
)  # fmt: skip
PYTHON = re.compile(r"\b\w+=(True|False|None|\d)|\bpass an? (bool|dict|float|int|list|str)\b|\bor None\b|: None ")


def messages(module):
    """Every text of a module that is no docstring, "…" in place of what an f-string fills in."""
    tree = ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    parts |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


@pytest.mark.parametrize("module", REACHED)
def test_no_advice_for_python_is_left(module):
    found = [text for text in map(for_command_line, messages(module)) if PYTHON.search(text)]
    assert found == []


def test_the_search_finds_such_advice():
    assert any(PYTHON.search(text) for text in messages("sanitizer"))
    assert any(PYTHON.search(text) for text in messages("parameter_checks"))


def test_other_messages_stay():
    text = "the prompt has 9 tokens, expected at most 5; shorten it"
    assert for_command_line(text) == text
