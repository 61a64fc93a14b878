"""`medusa-export bench`: figures that agree with each other, and a failure where tokens differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from medusa_exporter import answer_differences
from medusa_runtime import accept
from medusa_runtime.bundle import Bundle

from .bench.in_process import prompts_file, run, without_processes

FIGURES = ("tokens_per_step", "plain_step_ms", "medusa_step_ms", "overhead", "speedup", "host_us_per_step")


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    without_processes(monkeypatch)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return prompts_file(tmp_path)


def accept_wrongly(tree: Any, tokens: Sequence[int], argmax: Sequence[int], logits: Any) -> accept.Acceptance:
    """Keep the first candidate, whatever the decoder says of it."""
    return ([0, 1], argmax[1]) if tree.size > 1 else accept.greedy(tree, tokens, argmax)


def test_categories_are_told_where_there_are_some(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "prompts.jsonl", tmp_path / "bench.json"
    lines = [{"turns": ["Hello"], "category": kind} for kind in ("writing", "maths", "writing")]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["bench", tiny_bundle, "--prompts", file, "--threads", 1, "--max-new-tokens", 8, "--json", output]
    assert run(*arguments, "--profile", "tree-8,chain-2") == 0
    (_, first, _) = json.loads(output.read_text())["results"]
    assert {kind: found["prompts"] for kind, found in first["categories"].items()} == {"writing": 2, "maths": 1}
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[0].split() == ["tokens/step", "prompts", "tree-8", "chain-2"]
    assert table[1].split()[:3] == ["writing", "2", f"{first['categories']['writing']['tokens_per_step']:.2f}"]


def test_a_list_of_precisions_is_refused(tiny_precisions: Path, prompts: Path, capsys) -> None:
    assert run("bench", tiny_precisions, "--prompts", prompts, "--precision", "fp32,int8") == 2
    assert "got 'fp32,int8', expected one precision; run the command once for each" in capsys.readouterr().err


def test_a_precision_is_timed_alone(tiny_precisions: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    arguments = ["bench", tiny_precisions, "--prompts", prompts, "--threads", 1, "--max-new-tokens", 16]
    assert run(*arguments, "--precision", "int8", "--profile", "tree-4", "--json", output) == 0
    content = json.loads(output.read_text())
    assert {result["precision"] for result in content["results"]} == {"int8"}
    facts = content["backends"]["ort-cpu"]
    assert (facts["precision"], facts["gap_tolerance"], facts["gap_share_tolerance"]) == ("int8", None, 0.01)


def test_the_figures(tiny_bundle: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "made" / "bench.json"
    arguments = ["bench", tiny_bundle, "--prompts", prompts, "--threads", 1, "--max-new-tokens", 24]
    assert run(*arguments, "--profile", "tree-8,chain-2", "--profile", "mc_sim_7b_63", "--json", output) == 0
    shown = capsys.readouterr()
    content = json.loads(output.read_text())
    assert content["schema"] == 2
    assert [result["profile"] for result in content["results"]] == ["plain", "tree-8", "chain-2", "mc_sim_7b_63"]
    assert [result["nodes"] for result in content["results"]] == [1, 8, 3, 64]
    plain, *trees = content["results"]
    assert plain["speedup"] == plain["tokens_per_step"] == plain["speedup_over_best_plain"] == 1.0
    for result in trees:
        assert (result["backend"], result["precision"]) == ("ort-cpu", "fp32")
        assert result["identical"] is True
        assert (result["divergences"], result["max_logit_gap"], result["mismatches"]) == (0, 0.0, 0)
        assert result["overhead"] == pytest.approx(result["medusa_step_ms"] / result["plain_step_ms"])
        assert result["speedup"] == pytest.approx(result["tokens_per_step"] / result["overhead"])
        assert result["tokens_per_step"] > 1
        assert result["speedup_over_best_plain"] == pytest.approx(result["speedup"])
        assert (result["prompt_length"], result["max_new_tokens"], result["turns"]) == (None, 24, 4)
        assert sum(map(sum, result["tokens_added_by_steps"])) == result["tokens"]
        assert 0 < result["step_ms"]["p10"] <= result["step_ms"]["p50"] <= result["step_ms"]["p99"]
        assert 0 < result["ttft_ms"]["p50"] <= result["ttft_ms"]["p90"]
        assert 0 < result["host_us_per_step"] < 1e3 * result["medusa_step_ms"]
        for name in FIGURES:
            spread = result["percentiles_over_prompts"][name]
            assert 0 < spread["p10"] <= spread["p50"] <= spread["p90"]
        assert result["profile"] in shown.out
        assert f"{result['tokens_per_step']:.2f}" in shown.out
    assert content["machine"].keys() >= {"cpu", "cores", "threads", "platform"}
    assert content["machine"]["threads"] == 1
    assert content["versions"].keys() >= {"python", "numpy", "onnxruntime", "medusa-export"}
    prompts_told = content["prompts"]
    assert (prompts_told["file"], prompts_told["count"], prompts_told["turns"]) == ("prompts.jsonl", 4, 4)
    assert [(one["prompt"], one["turn"]) for one in prompts_told["skipped"]] == [(3, 1)]
    assert content["settings"] == {
        "profiles": ["tree-8", "chain-2", "mc_sim_7b_63"],
        "accept": "greedy",
        "forced": None,
        "prompt_lengths": [],
        "max_new_tokens": [24],
        "turns": "all",
        "limit": None,
    }
    facts = content["backends"]["ort-cpu"]
    assert (facts["precision"], facts["gap_tolerance"], facts["gap_share_tolerance"]) == ("fp32", 1e-3, None)
    assert (facts["library"], facts["context"]) == ("onnxruntime", 512)
    assert facts["weight_bytes"] > 100_000
    assert content["failures"] == {}
    assert content["bundle"]["digest"] == Bundle.open(tiny_bundle).manifest.digest
    assert str(tmp_path) not in output.read_text()
    assert "prompt 1/4, turn 2" in shown.err
    assert "prompt 3/4, turn 1: SKIPPED" in shown.err
    assert "tokens/step so far: tree-8 " in shown.err
    assert "prompt" not in shown.out


def test_every_profile_is_timed_unless_some_are_named(tiny_bundle: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    arguments = ["--turns", "first", "--limit", 1, "--max-new-tokens", 4, "--threads", 1]
    assert run("bench", tiny_bundle, "--prompts", prompts, "--json", output, *arguments) == 0
    content = json.loads(output.read_text())
    assert [one["profile"] for one in content["results"][1:]] == list(Bundle.open(tiny_bundle).manifest.profiles)
    assert {one["nodes"] for one in content["results"]} >= {2, 64}
    assert (content["prompts"]["count"], content["prompts"]["turns"]) == (1, 1)


def test_other_tokens_than_plain_decoding_s_fail_and_the_json_says_so(
    tiny_bundle: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(accept.ACCEPT_RULES, "greedy", accept_wrongly)
    output = tmp_path / "bench.json"
    arguments = ["--profile", "tree-4", "--max-new-tokens", 8, "--threads", 1]
    assert run("bench", tiny_bundle, "--prompts", prompts, "--json", output, *arguments) == 1
    shown = capsys.readouterr()
    (_, result) = json.loads(output.read_text())["results"]
    assert result["identical"] is False
    assert result["divergences"] == result["mismatches"] == len(result["differences"]) > 0
    assert result["max_logit_gap"] > 1e-3
    assert "prompt 1, turn 1, tree-4: token 1 is" in shown.out
    assert "not a tie" in shown.out
    assert shown.err.splitlines()[-1].startswith("error: ")


def test_a_tie_in_float_is_shown_and_forgiven(
    tiny_bundle: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(accept.ACCEPT_RULES, "greedy", accept_wrongly)
    monkeypatch.setattr(answer_differences, "_gap", lambda logits, tokens: (2.5e-4, 1e-5))
    output = tmp_path / "bench.json"
    arguments = ["--profile", "tree-4", "--max-new-tokens", 8, "--threads", 1]
    assert run("bench", tiny_bundle, "--prompts", prompts, "--json", output, *arguments) == 0
    (_, result) = json.loads(output.read_text())["results"]
    assert (result["identical"], result["mismatches"], result["max_logit_gap"]) == (False, 0, 2.5e-4)
    assert "logit gap 2.50e-04, a tie in float" in capsys.readouterr().out


def test_prompts_and_answers_of_given_lengths(
    tiny_bundle: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bench.json"
    arguments = ["--prompt-length", "40,60", "--max-new-tokens", "8,12", "--limit", 2, "--profile", "tree-4"]
    assert run("bench", tiny_bundle, "--prompts", prompts, "--json", output, "--threads", 1, *arguments) == 0
    content = json.loads(output.read_text())
    cells = [(one["prompt_length"], one["max_new_tokens"], one["profile"]) for one in content["results"]]
    assert cells == [(p, n, name) for p in (40, 60) for n in (8, 12) for name in ("plain", "tree-4")]
    for result in content["results"]:
        assert (result["turns"], result["tokens"]) == (2, 2 * (result["max_new_tokens"] - 1))
        assert (
            result["prompt_length"] <= result["mean_past_length"] <= result["prompt_length"] + result["max_new_tokens"]
        )
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0].split()[:4] == ["prompt", "new", "profile", "nodes"]
    assert "prompts of 60 tokens, 12 new tokens" in shown.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"turns": ["a"]}\n{"turns": "a"}\n', "prompts.jsonl:2: 'turns' must be a list"),
        ('{"turns": ["a"]}\n\n{oops\n', "prompts.jsonl:3: expected a JSON object"),
        ('{"turns": []}\n', "prompts.jsonl:1: 'turns' must be"),
        ('{"text": "a"}\n', "prompts.jsonl:1: expected a JSON object with 'turns'"),
        ("", "holds no prompts"),
        (json.dumps({"turns": ["word " * 600]}), "no step was taken"),
    ],
)
def test_prompts_that_cannot_be_timed_are_refused(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, words: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    output = tmp_path / "bench.json"
    assert run("bench", tiny_bundle, "--prompts", file, "--json", output, "--profile", "tree-4") == 1
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (["--limit", "0"], 2, "--limit"),
        (["--max-new-tokens", "1"], 2, "--max-new-tokens"),
        (["--prompts", "none.jsonl"], 2, "does not exist"),
        (["--backend", "abacus"], 2, "'abacus' is not one of 'ort-cpu', 'ort-cuda'"),
        (["--backends", "ort-cpu,ort-cuda"], 1, "no graph for backend ort-cuda"),
        (["--prompt-length", "12,x"], 2, "'x' is not a valid integer range"),
        (["--prompt-length", "5"], 1, "a prompt of 5 tokens is too short"),
        (
            ["--prompt-length", "400", "--profile", "tree-4"],
            1,
            "400 tokens, 128 new tokens and a tree of 4 nodes need 532",
        ),
        (["--forced", "none.json"], 2, "does not exist"),
        (["--profile", "oak"], 1, "no profile 'oak'"),
        (["--json", "."], 1, "is a folder"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tiny_bundle: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    code: int,
    words: str,
) -> None:
    given = {"--prompts": prompts, "--json": tmp_path / "bench.json"} | dict(
        zip(change[::2], change[1::2], strict=True)
    )
    assert run("bench", tiny_bundle, *(word for pair in given.items() for word in pair)) == code
    assert words in capsys.readouterr().err
