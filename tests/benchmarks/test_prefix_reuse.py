"""benchmarks/prefix_reuse.py compares second turns and times them, on the tiny bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import prefix_reuse
import pytest


def test_second_turns_are_compared_and_timed(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    turns = [["Why is the sky blue?", "And the sea?"], ["one turn"], ["Name a tree.", "Name another one."]]
    prompts.write_text("".join(json.dumps({"turns": each}) + "\n" for each in turns), encoding="utf-8")
    command = ["prefix_reuse.py", str(tiny_bundle), "--prompts", str(prompts), "--max-tokens", "8", "--shared", "100"]
    monkeypatch.setattr(sys, "argv", [*command, "--repeats", "2"])
    prefix_reuse.main()
    answers, times = map(json.loads, capsys.readouterr().out.splitlines())
    assert (answers["answers"], answers["different_by_turn"], answers["largest_gap"]) == (2, [0, 0], 0.0)
    assert 0 < answers["reused"] < 1
    assert times["cached_tokens"]["without"] == 0
    assert 0 < times["cached_tokens"]["in the cache"] < times["prompt_tokens"]
    assert times["ratio"].keys() == {"in the cache", "copied"}


def test_a_file_without_second_turns_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"turns": ["a"]}\n', encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["prefix_reuse.py", "bundle", "--prompts", str(prompts)])
    with pytest.raises(SystemExit):
        prefix_reuse.main()
    assert "has no prompts with two turns; expected some" in capsys.readouterr().err
