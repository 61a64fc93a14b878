"""TensorRT-RTX engines of the real model, built ahead of time without a GPU."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from medusa_exporter.cli import group
from medusa_exporter.engines.step_sizes import PLAIN_ENGINE_NODES
from medusa_runtime.bundle import Bundle

from .conftest import HEADS

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="TensorRT-RTX is there for Linux on x86-64 alone"
)


@pytest.mark.slow
def test_one_command_builds_the_real_models_engines(real_model: Path, tmp_path: Path) -> None:
    arguments = ["build", str(real_model), "--heads", str(HEADS), "-o", str(tmp_path / "bundle")]
    arguments += ["--backend", "tensorrt-rtx", "--profile", "tree-8", "--target", "sm86", "--max-length", "2048"]
    done = CliRunner().invoke(group, arguments)
    assert done.exit_code == 0, done.output
    bundle = Bundle.open(tmp_path / "bundle")
    engines = bundle.engines("tensorrt-rtx", "fp16")
    assert sorted((facts.nodes, facts.rows, facts.draft) for facts, _ in engines) == [
        (8, 8, True),
        (PLAIN_ENGINE_NODES, 1, False),
        (256, 1, False),
    ]
    weights = bundle.manifest.files["graphs/shared.data"].size
    assert all(facts.size > 0.9 * weights * (1 if facts.draft else 0.9) for facts, _ in engines)  # they hold them
    again = CliRunner().invoke(group, arguments)
    assert again.exit_code == 0 and again.output.count("is up to date") == 4
