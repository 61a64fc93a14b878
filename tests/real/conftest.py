"""The real model, SmolLM2-135M-Instruct with the heads of this repository, exported once for all tests here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..sharing import made_once

ROOT = Path(__file__).parents[2]
MODEL = Path(os.environ.get("MEDUSA_TEST_MODEL", ROOT / ".cache/model/SmolLM2-135M-Instruct.Q4_1.gguf"))
HEADS = ROOT / "heads/smollm2-135m-instruct"
# Everything a build imports comes first, so that the peak counts what the build itself takes.
BUILD = """
import json, resource, sys
from pathlib import Path
import gguf, onnx, onnx_ir, onnxruntime, onnxscript, torch, transformers
import torch.onnx._internal.exporter._core
imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from medusa_exporter.build import build
build(sys.argv[1], sys.argv[2], Path(sys.argv[3]), report=lambda line: print(line, file=sys.stderr))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"imported": imported * 1024, "peak": peak * 1024}))
"""


@dataclass(frozen=True)
class RealBundle:
    """The bundle's folder, and what its build took: bytes resident after imports, and at the peak."""

    path: Path
    imported: int
    peak: int


@pytest.fixture(scope="session")
def real_model() -> Path:
    assert MODEL.is_file(), f"{MODEL} is missing: `make model` downloads it"
    return MODEL


@pytest.fixture(scope="session")
def real_bundle(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RealBundle:
    path = made_once(tmp_path_factory, "real", lambda folder: _build(real_model, folder))
    memory = json.loads((path / "memory.json").read_text())
    return RealBundle(path / "bundle", memory["imported"], memory["peak"])


def _build(real_model: Path, folder: Path) -> None:
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD, str(real_model), str(HEADS), str(folder / "bundle")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (folder / "memory.json").write_text(done.stdout.splitlines()[-1])
