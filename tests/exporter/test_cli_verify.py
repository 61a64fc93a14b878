"""`medusa-export verify`: passes a sound bundle, and names what is wrong with an unsound one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from medusa_exporter import answer_differences
from medusa_exporter.cli import main
from medusa_runtime import Decoder, Engine, SamplingParams, accept, loading
from medusa_runtime.backends import ort_cuda
from medusa_runtime.backends.ort_cpu import OrtCpuBackend

from .test_cli_compare import on_host

TREES = ("--profile", "chain-2,tree-8", "--max-new-tokens", "24")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    lines = [["What is a tree?", "Write code"], ["word " * 60]]
    file.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in lines))
    return file


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["verify", *(str(argument) for argument in arguments)])
    return int(stop.value.code or 0)


def accept_wrongly(tree: Any, tokens: Sequence[int], argmax: Sequence[int], logits: Any) -> accept.Acceptance:
    """Keep the last candidate of depth 1, whatever the decoder says of it."""
    if tree.size == 1:
        return accept.greedy(tree, tokens, argmax)
    child = tree.children[0][-1]
    return [0, child], argmax[child]


def test_a_sound_bundle_passes_by_built_in_prompts(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_bundle, *TREES) == 0
    shown = capsys.readouterr()
    assert "the same tokens" in shown.out
    assert "2 trees against plain decoding" in shown.out
    assert "1 of 6 prompts skipped, too long for the context; " in shown.out
    assert "prompt 6/6, turn 1: SKIPPED" in shown.err  # the long one, by a tokenizer of almost single bytes


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_another_backend_is_checked_by_its_own_plain_decoding(
    tiny_backends: Path,
    prompts: Path,
    tmp_path: Path,
    precision: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ort_cuda, "load", on_host)
    output = tmp_path / "verify.json"
    arguments = [tiny_backends, "--backend", "ort-cuda", "--precision", precision, "--profile", "tree-4,tree-64"]
    assert run(*arguments, "--prompts", prompts, "--max-new-tokens", 24, "--json", output) == 0
    content = json.loads(output.read_text())
    assert (content["backend"], content["precision"], content["quality"]) == ("ort-cuda", precision, {})
    assert "2 trees against plain decoding" in capsys.readouterr().out


def test_precisions_are_set_beside_fp32(
    tiny_precisions: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "verify.json"
    arguments = [tiny_precisions, "--prompts", prompts, "--profile", "tree-4", "--max-new-tokens", 24]
    assert run(*arguments, "--json", output) == 0
    shown = capsys.readouterr()
    content = json.loads(output.read_text())
    assert (content["precision"], content["gap_tolerance"], content["gap_share_tolerance"]) == ("fp32", 1e-3, None)
    assert list(content["quality"]) == ["int8", "w8a8", "int4"]
    assert content["quality"]["int8"]["positions"] == content["tokens"]
    assert 0 < content["quality"]["int8"]["divergence"] < content["quality"]["int4"]["divergence"]
    assert "same top token" in shown.out
    assert "quality of int4 compared with fp32, on 3 answers" in shown.err


@pytest.mark.parametrize("precision", ["int8", "w8a8", "int4"])
def test_a_quantised_graph_gives_its_own_tokens(
    tiny_precisions: Path, prompts: Path, tmp_path: Path, precision: str
) -> None:
    output = tmp_path / "verify.json"
    arguments = [tiny_precisions, "--prompts", prompts, "--profile", "tree-4,tree-8", "--max-new-tokens", 48]
    assert run(*arguments, "--precision", precision, "--json", output) == 0
    content = json.loads(output.read_text())
    assert (content["precision"], content["gap_share_tolerance"], content["answers"]) == (precision, 0.01, 3)


def test_a_model_is_no_measure_of_quantised_weights(
    tiny_precisions: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_precisions, "--precision", "int8", "--model", tiny_model) == 2
    assert "--model is compared with fp32, not with int8" in capsys.readouterr().err
    assert run(tiny_precisions, "--precision", "int2") == 1
    assert "ort-cpu-fp32, ort-cpu-int4, ort-cpu-int8" in capsys.readouterr().err


def test_a_sound_bundle_passes_against_its_model(
    tiny_bundle: Path, tiny_model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "verify.json"
    assert run(tiny_bundle, "--prompts", prompts, "--model", tiny_model, *TREES, "--json", output) == 0
    assert "the same tokens" in capsys.readouterr().out
    content = json.loads(output.read_text())
    assert (content["passed"], content["differences"], content["answers"]) == (True, [], 3)
    assert content["profiles"] == ["chain-2", "tree-8"]
    assert run(tiny_bundle, "--prompts", prompts, *TREES, "--json", output, "--turns", "first", "--limit", 1) == 0
    assert json.loads(output.read_text())["answers"] == 1


def test_every_profile_is_checked_unless_some_are_named(
    tiny_bundle: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "verify.json"
    assert run(tiny_bundle, "--prompts", prompts, "--max-new-tokens", 8, "--json", output) == 0
    checked = json.loads(output.read_text())["profiles"]
    assert {"chain-1", "tree-8", "mc_sim_7b_63"} <= set(checked)


def test_a_wrongly_accepted_token_is_found_where_it_stands(
    tiny_bundle: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine.load(tiny_bundle, profile="plain", threads=1)
    tokens = engine.generate("What is a tree?", SamplingParams(max_tokens=4)).token_ids
    monkeypatch.setattr(loading, "Decoder", lambda backend, profile: Decoder(backend, profile, accept_wrongly))
    output = tmp_path / "verify.json"
    assert run(tiny_bundle, "--prompts", prompts, *TREES, "--json", output) == 1
    shown = capsys.readouterr()
    first = json.loads(output.read_text())["differences"][0]
    assert first["position"] == 1
    assert first["expected"] == tokens[1] != first["got"]
    assert first["gap"] > 1e-3
    line = next(line for line in shown.out.splitlines() if "prompt 1, turn 1, tree-8" in line)
    assert re.search(rf"token 1 is \d+ '.*', expected {tokens[1]} '.*'; logit gap \S+, not a tie", line)
    assert re.search(r"error: .*differences are more than a tie", shown.err)
    assert "the same tokens" not in shown.out


def test_rows_committed_wrongly_are_found(
    tiny_bundle: Path, prompts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = OrtCpuBackend.commit

    def shifted(self: OrtCpuBackend, sequence: int, path: Any, length: int) -> None:
        """Keep the root's rows in the last one's place, as a wrong index would."""
        commit(self, sequence, [*path[:-1], 0] if 1 < len(path) < 6 else path, length)

    monkeypatch.setattr(OrtCpuBackend, "commit", shifted)
    assert run(tiny_bundle, "--prompts", prompts, *TREES) == 1
    assert "tree-8 against plain decoding: token " in capsys.readouterr().out


def test_another_model_of_the_same_shape_is_found(
    tiny_bundle: Path,
    tiny_model: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import safetensors.torch

    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    weights = safetensors.torch.load_file(other / "model.safetensors")
    weights["model.norm.weight"][::2] *= 0.1
    safetensors.torch.save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert run(tiny_bundle, "--prompts", prompts, "--model", other, *TREES) == 1
    out = capsys.readouterr().out
    assert "plain decoding against transformers: token " in out
    assert "tree-8 against plain decoding" not in out


def test_a_tie_in_float_is_shown_with_its_gap_and_passes(
    tiny_bundle: Path, prompts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "Decoder", lambda backend, profile: Decoder(backend, profile, accept_wrongly))
    monkeypatch.setattr(answer_differences, "_gap", lambda logits, tokens: (2.5e-4, 1e-5))
    assert run(tiny_bundle, "--prompts", prompts, *TREES) == 0
    out = capsys.readouterr().out
    assert "logit gap 2.50e-04, a tie in float" in out
    assert "ties, all else the same" in out


def test_what_cannot_be_checked_is_refused(
    tiny_bundle: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts.write_text(json.dumps({"turns": ["word " * 600]}))
    assert run(tiny_bundle, "--prompts", prompts, *TREES) == 1
    assert "no prompt, of 1, fits the context of" in capsys.readouterr().err
    assert run(tiny_bundle, "--profile", "oak") == 1
    assert "no profile 'oak'" in capsys.readouterr().err
    assert run(tiny_bundle, "--model", tmp_path / "none") == 1
    assert "no such file or folder" in capsys.readouterr().err
    assert run(tiny_bundle, "--limit", 0) == 2
    assert run(tmp_path / "none") == 1
    assert "no such bundle" in capsys.readouterr().err


def test_without_a_model_neither_torch_nor_transformers_is_loaded(tiny_bundle: Path, prompts: Path) -> None:
    code = (
        "import sys; from medusa_exporter.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    )
    arguments = ["verify", str(tiny_bundle), "--prompts", str(prompts), *TREES, "--limit", "1", "--turns", "first"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
