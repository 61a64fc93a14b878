"""The commands on a bundle without heads: they run plain decoding, or say what they need heads for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from medusa_exporter.calibration import step_times
from medusa_exporter.cli import main


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"turns": ["hello there", "and then"]}) + "\n")
    return file


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def test_build_needs_no_heads(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", tiny_model, "-o", tmp_path / "bundle", "--precision", "int8") == 0
    shown = capsys.readouterr()
    assert "trace 2 layers (" in shown.err
    assert ", 0 profiles, " in shown.out
    assert run("build", tiny_model, "-o", tmp_path / "bundle", "--precision", "int8") == 0
    assert "is up to date" in capsys.readouterr().out
    assert run("build", tiny_model, "-o", tmp_path / "other", "--heads-revision", "v1") == 1
    assert "revision 'v1' of heads, but no heads" in capsys.readouterr().err


def test_inspect(tiny_without_heads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", tiny_without_heads, "--json", "-") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["heads"]["count"], facts["profiles"]) == (0, {})
    assert run("inspect", tiny_without_heads) == 0
    shown = capsys.readouterr().out
    assert "heads     none: plain decoding, or drafts that are copied from the text" in shown
    assert "depth" not in shown  # no table of trees
    assert run("inspect", tiny_without_heads, "--profile", "tree-4") == 1
    assert "this bundle has no heads: use plain decoding, or build with --heads" in capsys.readouterr().err


def test_generate(tiny_without_heads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (tiny_without_heads, "tree tree tree tree", "--max-new-tokens", "24", "--precision", "w8a8")
    answers = []
    for draft in ("auto", "ngram", "heads"):
        assert run("generate", *options, "--draft", draft) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2]
    assert run("generate", *options, "--compare") == 0
    assert "the same tokens" in capsys.readouterr().err
    assert run("generate", *options, "--profile", "tree-4") == 1
    assert "this bundle has no heads: use plain decoding, or build with --heads" in capsys.readouterr().err


def test_verify(
    tiny_without_heads: Path, tiny_model: Path, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("verify", tiny_without_heads, "--prompts", prompts, "--max-new-tokens", "12")
    assert run(*options, "--model", tiny_model, "--precision", "fp32", "--json", tmp_path / "v.json") == 0
    shown = capsys.readouterr().out
    assert f"plain decoding against {tiny_model} in transformers: the same tokens" in shown
    assert json.loads((tmp_path / "v.json").read_text())["profiles"] == []
    assert run(*options, "--profile", "plain") == 0  # precisions are compared
    shown = capsys.readouterr().out
    assert "w8a8" in shown and "plain decoding of a bundle without heads: nothing to compare them with" in shown
    assert run(*options, "--backend", "ort-cpu", "--profile", "tree-4") == 1
    assert "this bundle has no heads" in capsys.readouterr().err


def test_verify_refuses_to_check_nothing(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", tiny_model, "-o", tmp_path / "bundle") == 0
    assert run("verify", tmp_path / "bundle") == 1
    assert "has no heads, so there is no tree to check; " in capsys.readouterr().err


def test_compare(tiny_without_heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("polygraphy")
    options = ("compare", tiny_without_heads, "--limit", "1", "--steps", "4")
    assert run(*options, "--backend", "ort-cpu:fp32,ort-cpu:int8") == 0
    shown = capsys.readouterr().out
    assert "4 steps of 1 prompt" not in shown  # prompts are steps too
    assert "plain only: the bundle has no heads" in shown and "candidates" not in shown
    assert run(*options, "--backend", "ort-cpu:fp32", "--save", tmp_path / "saved") == 0
    against = ("--backend", "ort-cpu:fp32", "--against", tmp_path / "saved")
    assert run("compare", tiny_without_heads, *against) == 0
    assert "0.00e+00" in capsys.readouterr().out


def test_bench(tiny_without_heads: Path, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("bench", tiny_without_heads, "--prompts", prompts, "--precision", "fp32", "--max-new-tokens", "8")
    assert run(*options, "--json", tmp_path / "bench.json") == 0
    content = json.loads((tmp_path / "bench.json").read_text())
    assert [result["profile"] for result in content["results"]] == ["plain"]
    assert run("report", tmp_path / "bench.json", "-o", tmp_path / "report.html") == 0
    capsys.readouterr()
    assert run(*options, "--profile", "tree-4") == 1
    assert "this bundle has no heads: use plain decoding, or build with --heads" in capsys.readouterr().err


def test_calibrate_and_search_tree(
    tiny_without_heads: Path,
    tmp_path: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(step_times, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(step_times, "BURST_SECONDS", 0.0)
    options = ("calibrate", tiny_without_heads, "--precision", "fp32", "--seconds", "0")
    assert run(*options, "--prompts", prompts) == 1
    assert "has no heads whose accuracy prompts could measure; leave out --prompts" in capsys.readouterr().err
    assert run(*options, "--json", tmp_path / "c.json") == 0
    assert "this bundle has no heads: steps of several nodes verify tokens" in capsys.readouterr().out
    [graph] = json.loads((tmp_path / "c.json").read_text())["graphs"]
    assert graph["acceptance"] is None and len({step["nodes"] for step in graph["steps"]}) > 1
    own = ("--max-new-tokens", "8", "--calibration", tmp_path / "c.json", "--precision", "fp32")
    assert run("generate", tiny_without_heads, "hi", *own) == 0
    assert run("search-tree", tiny_without_heads, "--precision", "fp32") == 1
    assert "has no heads, so there is no tree to search; build it with --heads" in capsys.readouterr().err
