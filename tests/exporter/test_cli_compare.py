"""`medusa-export compare`: equal backends pass, a changed tensor is named, and files and options are checked."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from medusa_exporter.cli import main
from medusa_exporter.compare.reference_file import ReferenceWriter
from medusa_runtime.backends import ort_cuda
from medusa_runtime.backends.ort_cpu import OrtCpuBackend
from medusa_runtime.bundle import Bundle
from medusa_runtime.facts import ModelFacts

from ..runtime.backends.host_device import HostDevice

BOTH = ("--backends", "ort-cpu:fp32,ort-cpu:int8")
ONE = ("--backends", "ort-cpu:fp32")
FEW = ("--limit", 2, "--steps", 3)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["compare", *(str(argument) for argument in arguments)])
    return int(stop.value.code or 0)


def on_host(
    bundle: Bundle,
    model: ModelFacts,
    name: str,
    precision: str | None,
    threads: int | None,
    gpu: int = 0,
    map_weights: bool = False,
) -> ort_cuda.OrtCudaBackend:
    """What `ort-cuda` loads, on a device that is the host."""
    device: Any = HostDevice()
    return ort_cuda.load_on_device(device, bundle, model, name, precision)


@pytest.fixture
def doctored(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Change one output of every step that is saved from now on."""

    def change(name: str, by: float) -> None:
        add = ReferenceWriter.add

        def wrongly(self: ReferenceWriter, outputs: Any) -> None:
            array = outputs[name].copy()
            array.reshape(-1)[-1] += by
            add(self, outputs | {name: array})

        monkeypatch.setattr(ReferenceWriter, "add", wrongly)

    return change


def test_two_precisions_of_one_backend_agree(
    tiny_precisions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "compare.json"
    assert run(tiny_precisions, *BOTH, "--steps", 3, "--json", output) == 0
    shown = capsys.readouterr()
    assert "ort-cpu:int8 equals ort-cpu:fp32 within tolerance: " in shown.out.splitlines()[-1]
    assert "plain and tree-8" in shown.out.splitlines()[-1]  # the largest
    lines = [line.split() for line in shown.out.splitlines()]
    assert {line[0] for line in lines[1:-1]} == {"prefill", "plain", "tree"}
    assert {line[1] for line in lines[1:-1]} == {
        "tokens", "candidates", "argmax", "logits", "hidden", "keys", "values",
    }  # fmt: skip
    assert all(line[4] == "ok" for line in lines[1:-1])
    assert "prompt 1/6" in shown.err
    assert "the first 489 of its 1789 tokens" in shown.err  # the long one, by a tokenizer of almost single bytes
    content = json.loads(output.read_text())
    assert (content["passed"], content["profile"], content["prompts"]) == (True, "tree-8", 6)
    assert content["reference"] == {"backend": "ort-cpu", "precision": "fp32"}
    assert content["compared"] == {"backend": "ort-cpu", "precision": "int8"}
    of_logits = [row for row in content["tensors"] if row["group"] == "logits"]
    assert [row["kind"] for row in of_logits] == ["prefill", "plain", "tree"]
    assert all(0 < row["error"] < row["tolerance"] for row in of_logits)  # really two precisions


def test_another_backend_with_another_variant_agrees(
    tiny_backends: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_cuda, "load", on_host)
    assert run(tiny_backends, "--backends", "ort-cpu,ort-cuda", *FEW) == 0
    assert "ort-cuda:fp32 equals ort-cpu:fp32 within tolerance" in capsys.readouterr().out
    assert run(tiny_backends, "--backends", "ort-cuda:fp16", "--backends", "ort-cuda:fp32", *FEW) == 0


def test_summaries_of_other_rows_are_found(
    tiny_backends: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_cuda, "load", on_host)
    assert run(tiny_backends, "--backends", "ort-cpu,ort-cuda", *FEW) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if " summaries " in line]
    assert [row[0] for row in rows] == ["prefill", "plain", "tree"] and {row[4] for row in rows} == {"ok"}
    read = ort_cuda.OrtCudaBackend.read_summary
    monkeypatch.setattr(ort_cuda.OrtCudaBackend, "read_summary", lambda self, row: read(self, max(row - 1, 0)))
    for sides in ("ort-cpu,ort-cuda", "ort-cuda,ort-cpu"):
        assert run(tiny_backends, "--backends", sides, *FEW) == 1
        assert (
            "worst is summaries (summaries) of the tree step at prompt 1, step 1: error inf" in capsys.readouterr().err
        )
    reference = tmp_path / "reference"
    assert run(tiny_backends, "--backends", "ort-cuda:fp32", *FEW, "--save", reference) == 1
    assert (
        "ort-cuda:fp32: the summaries of rows differ from their own logits by inf in the tree"
        in capsys.readouterr().err
    )
    assert not reference.exists()


def test_rows_committed_wrongly_are_found(
    tiny_precisions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, sides = OrtCpuBackend.commit, []

    def shifted(self: OrtCpuBackend, sequence: int, path: Any, length: int) -> None:
        """Keep the root's rows in the last one's place on the second side, as a wrong index would."""
        if self not in sides:
            sides.append(self)
        wrong = self is not sides[0] and 1 < len(path) < 6
        commit(self, sequence, [*path[:-1], 0] if wrong else path, length)

    same = ("--backends", "ort-cpu:fp32,ort-cpu:fp32", "--limit", 3)
    assert run(tiny_precisions, *same) == 0
    monkeypatch.setattr(OrtCpuBackend, "commit", shifted)
    assert run(tiny_precisions, *same) == 1
    assert "ort-cpu:fp32 is not equal to ort-cpu:fp32 within tolerance: worst is " in capsys.readouterr().err


def test_what_one_process_saved_another_compares(
    tiny_precisions: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "new" / "reference", tmp_path / "compare.json"
    assert run(tiny_precisions, *ONE, *FEW, "--profile", "tree-4", "--save", file) == 0
    assert "ort-cpu:fp32: 14 steps of 2 prompts, tree-4" in capsys.readouterr().out
    assert run(tiny_precisions, "--backends", "ort-cpu:int8", "--against", file) == 0
    assert "ort-cpu:int8 equals ort-cpu:fp32 within tolerance: 14 steps" in capsys.readouterr().out
    assert run(tiny_bundle, *ONE, "--against", file, "--json", output) == 0  # another bundle of the same model
    content = json.loads(output.read_text())
    assert (content["profile"], content["steps"]) == ("tree-4", 14)
    assert {row["error"] for row in content["tensors"]} == {0.0}  # the same graph, on the same machine


@pytest.mark.parametrize(
    ("name", "by", "told"),
    [
        ("logits", 5.0, "logits (logits) of the"),
        ("hidden", np.nan, "hidden (hidden) of the"),
        ("new_key_0", 0.1, "new_key_0 (keys) of the"),
        ("new_value_1", -0.1, "new_value_1 (values) of the"),
    ],
)
def test_one_changed_tensor_is_named(
    tiny_precisions: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    doctored: Callable[..., None],
    name: str,
    by: float,
    told: str,
) -> None:
    file, output = tmp_path / "reference", tmp_path / "compare.json"
    doctored(name, by)
    assert run(tiny_precisions, *ONE, *FEW, "--save", file) == 0
    assert run(tiny_precisions, *ONE, "--against", file, "--json", output) == 1
    shown = capsys.readouterr()
    (line,) = (line for line in shown.err.splitlines() if line.startswith("error: "))
    assert line.startswith("error: ort-cpu:fp32 is not equal to ort-cpu:fp32 within tolerance: worst is " + told)
    assert sum("FAILS" in line for line in shown.out.splitlines()) == 3  # prefill, plain, tree
    content = json.loads(output.read_text())
    assert not content["passed"]
    assert {row["name"] for row in content["tensors"] if not row["passed"]} == {name}


def test_a_file_that_is_no_reference_is_refused_in_one_line(
    tiny_precisions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("hello")
    assert run(tiny_precisions, *ONE, "--against", tmp_path / "text") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'text'} is not a complete reference file: ")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "Missing option '--backend'"),
        (("--backends", "abacus,ort-cpu"), 2, "'abacus' is not one of 'ort-cpu', 'ort-cuda'"),
        (("--backends", "ort-cpu,ort-cpu,ort-cpu"), 2, "--backend names 3; expected two, or one"),
        (ONE, 2, "--backend names 1; expected two, or one with --save or --against"),
        ((*BOTH, "--save", "x"), 2, "--backend names 2"),
        ((*BOTH, "--against", __file__), 2, "--backend names 2"),
        ((*ONE, "--save", "x", "--against", __file__), 2, "leave out one of the two"),
        ((*ONE, "--against", __file__, "--steps", 3), 2, "leave out --prompts, --limit, --steps and --profile"),
        ((*ONE, "--against", __file__, "--profile", "tree-4"), 2, "takes prompts, steps and tree from the file"),
        ((*ONE, "--save", "x", "--json", "y"), 2, "--save compares nothing yet"),
        ((*ONE, "--against", "nowhere"), 2, "does not exist"),
        ((*BOTH, "--steps", 0), 2, "--steps"),
        (("--backends", "ort-cpu:fp32,ort-cpu:int2"), 1, "no graph for backend ort-cpu, precision int2; it has"),
        ((*BOTH, "--profile", "oak"), 1, "no profile 'oak'"),
        ((*BOTH, "--steps", 200), 1, "the context of 512 tokens has no room for a prompt and 200 steps of tree-8"),
    ],
)
def test_wrong_usage_is_told(
    tiny_precisions: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(tiny_precisions, *arguments) == code
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_into_the_bundle(tiny_precisions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (*ONE, "--save"), (*BOTH, "--json"):
        assert run(tiny_precisions, *option, tiny_precisions / "file") == 1
        assert "is inside of the bundle, which must hold no other files" in capsys.readouterr().err
    assert not (tiny_precisions / "file").exists()


def test_a_smaller_context_than_the_references_is_reported(
    tiny_precisions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tiny_precisions, *ONE, *FEW, "--save", tmp_path / "file") == 0
    made = OrtCpuBackend.__init__

    def smaller(self: OrtCpuBackend, graph: Path, model: Any, *arguments: Any, **options: Any) -> None:
        made(self, graph, dataclasses.replace(model, context=64), *arguments, **options)

    monkeypatch.setattr(OrtCpuBackend, "__init__", smaller)
    assert run(tiny_precisions, *ONE, "--against", tmp_path / "file") == 1
    assert "ort-cpu has a context of 64; use shorter prompts or fewer --steps" in capsys.readouterr().err


def test_it_needs_neither_torch_nor_transformers_nor_onnx(tiny_precisions: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx'): sys.modules[name] = None\n"
        "from medusa_exporter.cli import main\n"
        "main(sys.argv[1:])"
    )
    arguments = ["compare", str(tiny_precisions), *BOTH, *map(str, FEW)]
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "equals" in done.stdout.splitlines()[-1]


def test_without_polygraphy_nothing_is_begun(
    tiny_precisions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy.logger", None)
    assert run(tiny_precisions, *BOTH) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'medusa-export[export]'" in line
