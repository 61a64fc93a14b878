"""The error messages that the troubleshooting page explains are those of the code, word for word."""

import ast
import re

from .pages import ROOT

PAGE = ROOT / "docs/troubleshooting.md"
PACKAGES = ("profiles/medusa_profiles", "runtime/medusa_runtime", "exporter/medusa_exporter")


def texts_of_code():
    """Every text in the packages, "…" in place of what an f-string fills in."""
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_messages_begin_as_the_page_says():
    explained = re.findall(r"^### `(.+)`$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(explained) > 20
    assert len(set(explained)) == len(explained)
    texts = list(texts_of_code())
    assert [message for message in explained if not any(text.startswith(message) for text in texts)] == []
