"""The GPU's number, from the command line to the device: every command that runs a backend takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from medusa_runtime.errors import MedusaError

from .bench.in_process import prompts_file, run, without_processes

COMMANDS: dict[str, list[str]] = {
    "generate": ["Hi", "--backend", "ort-cuda", "--precision", "fp32"],
    "verify": ["--backend", "ort-cuda", "--precision", "fp32"],
    "compare": ["--backends", "ort-cuda:fp32,ort-cpu:fp32"],
    "bench": ["--backend", "ort-cuda", "--precision", "fp32", "--prompts", "PROMPTS", "--json", "OUTPUT"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("options", "index"), [(["--gpu", "3"], 3), ([], 0)])
def test_the_gpu_of_the_option_is_taken(
    tiny_backends: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    options: list[str],
    index: int,
) -> None:
    def refused(index: int) -> Any:
        raise MedusaError(f"asked for GPU {index}")

    without_processes(monkeypatch)
    monkeypatch.setattr("medusa_runtime.backends.cuda.CudaDevice", refused)
    places = {"PROMPTS": str(prompts_file(tmp_path)), "OUTPUT": str(tmp_path / "out.json")}
    words = [places.get(word, word) for word in COMMANDS[command]]
    assert run(command, tiny_backends, *words, *options) == 1
    assert f"asked for GPU {index}" in capsys.readouterr().err


def test_a_negative_number_is_bad_usage(tiny_backends: Path) -> None:
    assert run("generate", tiny_backends, "Hi", "--gpu", "-1") == 2
