"""The description of machine and packages."""

from __future__ import annotations

import subprocess
import sys

from medusa_exporter.bench.machine import describe_machine, versions


def test_the_machine_is_described() -> None:
    described = describe_machine(3)
    assert set(described) == {"cpu", "cores", "processors", "threads", "platform"}
    assert described["threads"] == 3
    assert described["cpu"]
    assert describe_machine(None)["threads"] == described["cores"]


def test_versions_are_of_what_is_installed() -> None:
    found = versions()
    assert found.keys() >= {"python", "numpy", "medusa-export", "onnxruntime", "tokenizers"}
    assert "onnxruntime-gpu" not in found


def test_no_library_but_the_backend_s_own_is_needed() -> None:
    """A Python for TensorRT has no ONNX Runtime and no exporter; safetensors belongs to the extra `tensorrt`."""
    missing = (
        "torch",
        "transformers",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "onnx_ir",
        "gguf",
        "matplotlib",
    )
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({missing!r}))\n"
        "import medusa_exporter.cli.bench, medusa_exporter.cli.engines, medusa_runtime.backends.tensorrt\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)
