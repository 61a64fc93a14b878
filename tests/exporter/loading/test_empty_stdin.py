"""Nothing piped in answers a library's question."""

from __future__ import annotations

import io
import sys

import pytest
from medusa_exporter.loading.empty_stdin import empty_stdin


def test_a_question_finds_no_answer_and_the_input_stays_for_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\nthe rest"))
    with empty_stdin():
        assert sys.stdin.read() == ""
        with pytest.raises(EOFError):
            input()
    assert sys.stdin.read() == "y\nthe rest"
    with pytest.raises(RuntimeError), empty_stdin():
        raise RuntimeError
    assert isinstance(sys.stdin, io.StringIO)
