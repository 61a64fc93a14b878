"""ONNX Runtime is imported in one place, which refuses a version that would end the process."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from medusa_runtime.backends import ort_library
from medusa_runtime.errors import MissingExtraError

ROOT = Path(__file__).parents[3]
ROOMS = ("profiles", "runtime", "exporter", "benchmarks")


def imported(file: Path) -> set[str]:
    """The modules that a file imports, at any level."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name.partition(".")[0] for name in found}


def test_nothing_else_imports_it() -> None:
    files = [file for room in ROOMS for file in (ROOT / room).rglob("*.py")]
    importing = [file.relative_to(ROOT).as_posix() for file in files if "onnxruntime" in imported(file)]
    assert importing == ["runtime/medusa_runtime/backends/ort_library.py"]


@pytest.mark.parametrize("version", ["1.18.0", "1.30.1"])
def test_a_version_that_would_crash_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("onnxruntime.__version__", version)
    with pytest.raises(MissingExtraError, match=rf"{version} is too old.*1\.31 or newer.*medusa-export\[export\]"):
        ort_library.import_onnxruntime("export")


def test_a_build_with_it_is_refused_before_any_work(
    tiny_model: Path, tiny_heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medusa_exporter import build as building

    monkeypatch.setattr("onnxruntime.__version__", "1.30.1")
    monkeypatch.setattr(building, "write_bundle", lambda *_arguments: pytest.fail("worked for minutes"))
    with pytest.raises(MissingExtraError, match=r"1\.30\.1 is too old"):
        building.build(str(tiny_model), str(tiny_heads), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
