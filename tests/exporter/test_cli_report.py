"""`medusa-export report`: what bench wrote becomes one page."""

from __future__ import annotations

from pathlib import Path

import pytest

from .bench.in_process import run, without_processes
from .report.factories import content, written


def test_a_bench_becomes_a_page(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_processes(monkeypatch)
    prompts, measured, page = tmp_path / "prompts.jsonl", tmp_path / "a.json", tmp_path / "new" / "report.html"
    prompts.write_text('{"turns": ["What is a tree?"]}\n{"turns": ["Hello"]}\n')
    arguments = ["--profile", "tree-4,tree-8", "--prompt-length", "40,60", "--max-new-tokens", 8, "--threads", 1]
    assert run("bench", tiny_bundle, "--prompts", prompts, *arguments, "--json", measured) == 0
    assert run("report", measured, "-o", page) == 0
    assert "1 run, 6 results" in capsys.readouterr().out
    text = page.read_text()
    assert text.count("<svg") == 4
    assert "tree-8" in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["a.json"], 2, "--output"),
        (["-o", "out.html"], 2, "Missing argument"),
        (["none.json", "-o", "out.html"], 2, "does not exist"),
        (["a.json", "-o", "."], 1, "is a folder; expected the file that medusa-export report is to write"),
        (["a.json", "-o", "a.json"], 1, "is one of the files to read"),
        (["a.json", "b.json", "-o", "out.html"], 1, "b.json is the same run as a.json"),
        (["bad.json", "-o", "out.html"], 1, "bad.json is not valid JSON"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.json"):
        written(tmp_path / name, content({"ort-cpu": 1.0}))
    (tmp_path / "bad.json").write_text("{")
    assert run("report", *arguments) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()
