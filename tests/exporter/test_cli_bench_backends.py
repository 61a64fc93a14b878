"""`medusa-export bench` on several backends, and with acceptance that is borrowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from medusa_exporter.bench import worker
from medusa_runtime.backends import BACKENDS
from medusa_runtime.bundle import Bundle

from .bench.in_process import prompts_file, run, without_processes


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    without_processes(monkeypatch)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return prompts_file(tmp_path)


def test_acceptance_can_be_forced_from_a_recording(
    tiny_bundle: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded, output = tmp_path / "real.json", tmp_path / "forced.json"
    arguments = ["bench", tiny_bundle, "--prompts", prompts, "--threads", 1, "--profile", "tree-8"]
    assert run(*arguments, "--max-new-tokens", 24, "--json", recorded) == 0
    assert run(*arguments, "--max-new-tokens", 40, "--limit", 1, "--forced", recorded, "--json", output) == 0
    shown, content = capsys.readouterr(), json.loads(output.read_text())
    assert content["settings"]["accept"] == "forced"
    assert content["settings"]["forced"] == {"file": "real.json", "model": Bundle.open(tiny_bundle).model.name}
    assert "FORCED: steps kept as many tokens as" in shown.out
    real = json.loads(recorded.read_text())["results"][1]["tokens_added_by_steps"]
    flat = [kept for answer in [*real, *real] for kept in answer[:-1]]
    for answer in content["results"][1]["tokens_added_by_steps"]:
        assert sum(answer) == 39
        begins = [at for at in range(len(flat)) if flat[at : at + len(answer) - 1] == answer[:-1]]
        assert begins
    assert content["results"][1]["differences"] == []
    assert run(*arguments[:-1], "tree-4", "--forced", recorded, "--json", output) == 1
    assert "real.json has no profile 'tree-4', it has tree-8; record" in capsys.readouterr().err
    assert run(*arguments, "--forced", output, "--json", tmp_path / "twice.json") == 1
    assert "has the acceptance rule 'forced'" in capsys.readouterr().err


def test_backends_answer_in_turns_and_one_that_fails_costs_the_others_nothing(
    tiny_backends: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = worker.load_backend

    def on_the_cpu(bundle: Bundle, name: str, precision: str | None, threads: int | None, *_gpu: int | None) -> Any:
        backend: Any = load(bundle, "ort-cpu", precision, threads)
        backend.name = name
        if name == "ort-cuda":
            runs, rest = backend.run, iter(range(80))

            def run_or_fail(step: Any) -> None:
                if next(rest, None) is None:
                    raise RuntimeError("the GPU fell off")
                runs(step)

            backend.run = run_or_fail
        return backend

    monkeypatch.setattr(worker, "load_backend", on_the_cpu)
    output = tmp_path / "bench.json"
    arguments = ["--prompt-length", 40, "--max-new-tokens", 8, "--profile", "tree-4", "--threads", 1]
    given = ["bench", tiny_backends, "--prompts", prompts, "--json", output, *arguments]
    assert run(*given, "--backends", "ort-cpu,ort-cuda") == 1
    shown, content = capsys.readouterr(), json.loads(output.read_text())
    found = {(one["backend"], one["profile"]): one for one in content["results"]}
    assert [*found] == [(name, mode) for name in ("ort-cpu", "ort-cuda") for mode in ("plain", "tree-4")]
    assert found["ort-cpu", "plain"]["turns"] == 4
    done = found["ort-cuda", "plain"]["turns"]
    assert 0 < done < 4
    assert found["ort-cuda", "tree-4"]["same_as_first_backend"] == {"answers": done, "identical": done}
    assert content["failures"].keys() == {"ort-cuda"}
    assert "FAILED: backend ort-cuda: unexpected RuntimeError: the GPU fell off" in shown.err
    assert shown.err.splitlines()[-1].startswith("error: backend ort-cuda: unexpected RuntimeError: the GPU fell off")
    assert f"ort-cuda, plain: {done} of {done} answers are ort-cpu's" in shown.out
    assert shown.out.splitlines()[0].split()[:2] == ["backend", "profile"]


def test_backends_that_cannot_be_loaded_are_told_before_any_work(
    tiny_backends: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BACKENDS, "ort-cuda", "no.such.module")
    output = tmp_path / "bench.json"
    arguments = ["bench", tiny_backends, "--prompts", prompts, "--json", output, "--threads", 1, "--profile", "tree-4"]
    assert run(*arguments, "--backends", "ort-cuda") == 1
    assert not output.exists()
    assert run(*arguments, "--backends", "ort-cuda,ort-cpu", "--max-new-tokens", 4, "--limit", 1) == 1
    assert [one["backend"] for one in json.loads(output.read_text())["results"]] == ["ort-cpu", "ort-cpu"]
    assert "error: backend ort-cuda: unexpected ModuleNotFoundError" in capsys.readouterr().err
