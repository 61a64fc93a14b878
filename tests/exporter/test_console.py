"""Tables and progress: whole in a pipe, folded on a terminal, silent where that is asked for."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from medusa_exporter import console
from medusa_exporter.console import Progress, Verbosity, is_utf8, set_verbosity, table, warn

HEADINGS = ("name", "nodes", "source")
ROWS = [("tree-[4]", "4", "word " * 60), ("b", "1,234", ":smile: x")]


@pytest.fixture(autouse=True)
def normal() -> Iterator[None]:
    yield
    set_verbosity(Verbosity.NORMAL)


def on_terminal(code: str, columns: int = 60, **environment: str) -> str:
    """What a program prints on a terminal of so many columns."""
    main, child = pty.openpty()
    variables = os.environ | {"COLUMNS": str(columns), "TERM": "xterm"} | environment
    with subprocess.Popen([sys.executable, "-c", code], stdout=child, stderr=child, stdin=child, env=variables):
        os.close(child)
        shown = b""
        try:
            while part := os.read(main, 65536):
                shown += part
        except OSError:  # the end, on Linux
            pass
    os.close(main)
    return shown.decode().replace("\r\n", "\n")


def test_a_table_in_a_pipe_has_one_line_for_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    heading, *rows = table(HEADINGS, ROWS, text=("name", "source")).splitlines()
    assert heading == "name      nodes  source"
    assert rows == [f"tree-[4]      4  {('word ' * 60).strip()}", "b         1,234  :smile: x"]
    assert table(("a", "b"), [("1", "2")], title="Title").splitlines() == ["Title", "a  b", "1  2"]


PRINT = f"from medusa_exporter.console import table\nprint(table({HEADINGS!r}, {ROWS!r}, text=('name', 'source')))"


def test_a_table_on_a_terminal_is_folded_and_keeps_its_figures() -> None:
    shown = on_terminal(PRINT, 40)
    assert "\x1b[1m" in shown and "─" in shown
    lines = re.sub(r"\x1b\[\d*m", "", shown).splitlines()
    assert max(map(len, lines)) <= 40
    assert sum(line.count("word") for line in lines) == 60
    assert any("1,234" in line for line in on_terminal(PRINT, 12).splitlines())


def test_a_table_on_a_terminal_without_utf8_is_ascii() -> None:
    shown = on_terminal(PRINT, PYTHONIOENCODING="ascii")
    assert shown.isascii() and "---" in shown


def test_quiet_prints_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.report("one")
    warn("two")
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("[  0.0 s] one\nwarning: two")
    set_verbosity(Verbosity.QUIET)
    progress.report("one")
    warn("two")
    assert capsys.readouterr().err == ""


def test_long_lines_of_progress_are_neither_wrapped_nor_styled(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().report("[red]word[/red] " * 40)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.count("[red]") == 40


def test_a_bar_without_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    with Progress().bar("states", 2_000, "tokens") as bar:
        bar.advance(500)
        bar.advance(1_500)
    first, last = capsys.readouterr().err.splitlines()
    assert "states: 500 of 2,000 tokens (25%), about " in first
    assert "states: 2,000 of 2,000 tokens (100%), about 0 s left" in last


def test_a_bar_on_a_terminal_is_drawn_and_removed() -> None:
    shown = on_terminal(
        "from medusa_exporter.console import Progress\n"
        "progress = Progress()\n"
        "with progress.bar('states', 2000, 'tokens') as bar:\n"
        "    bar.advance(500); progress.report('a line above')\n"
        "    bar.advance(1500)\n"
    )
    assert "states" in shown and "of 2,000 tokens" in shown and "a line above" in shown


def test_a_stream_without_lines_gets_ascii_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, expected in (("ascii", "|- 2-9 1.5x ?"), ("cp437", "|- 2-9 1.5x ?"), ("utf-8", "├─ 2–9 1.5× 語")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding, errors="replace")
        monkeypatch.setattr(sys, "stdout", stream)
        console.write("├─ 2–9 1.5× 語")
        assert stream.buffer.getvalue().decode(encoding) == f"{expected}\n"  # type: ignore[attr-defined]


def test_file_names_are_shown_as_utf8_whatever_the_locale() -> None:
    assert console.readable("pr\udcc3\udcb6mpts.jsonl") == "prömpts.jsonl"
    assert console.readable("größe \udcfc") == "größe \ufffd"


def test_encodings() -> None:
    assert is_utf8(None)
    assert is_utf8(io.TextIOWrapper(io.BytesIO(), "UTF-8"))
    assert not is_utf8(io.TextIOWrapper(io.BytesIO(), "latin-1"))
