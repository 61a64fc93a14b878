"""Finds the documentation's pages and what in them can be checked: code blocks, commands, links and names."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "benchmarks/README.md",
    ROOT / "heads/smollm2-135m-instruct/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
NOT_RUN = re.compile(r"<!-- not run: .+ -->\s*")
_FENCE = re.compile(r"^( *)(`{3,})(\S*).*$")
_COMMAND = re.compile(r"^\s*(?:\$ )?(medusa-export .*)")
_LINK = re.compile(r"(?<!`)\[[^\]\n]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced code block: its language, its text, its first line's number, and whether the tests may run it."""

    language: str
    text: str
    line: int
    runs: bool


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page):
    """Return the fenced code blocks of a page in order."""
    found, opened, lines, before = [], None, [], ""
    for number, line in enumerate(page.read_text(encoding="utf-8").split("\n"), start=1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened, lines = (fence[3], number + 1, not NOT_RUN.fullmatch(before)), []
        elif opened is not None and fence and not fence[3]:
            found.append(Block(opened[0], "\n".join(lines) + "\n", *opened[1:]))
            opened = None
        elif opened is not None:
            lines.append(line)
        if opened is None and line.strip():
            before = line
    assert opened is None, f"{name_of(page)}: a code block is not closed"
    return found


def commands(page):
    """Return the words of every `medusa-export` command in a page's code blocks, fenced or indented by 4 spaces."""
    text = page.read_text(encoding="utf-8")
    indented = "\n".join(line for line in text.split("\n") if line.startswith("    "))
    code = re.sub(r"\\\n\s*", "", "\n".join([indented, *(block.text for block in blocks(page))]))
    lines = dict.fromkeys(found[1] for line in code.split("\n") if (found := _COMMAND.match(line)))
    return [shlex.split(line, comments=True) for line in lines]


def links(page):
    """Return the targets of a page's links that are not addresses of the web."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [target for target in _LINK.findall(text) if not re.match(r"[a-z]+:", target)]


def anchors(page):
    """Return the anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#{1,6} (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
