"""What the packages import is what pyproject.toml asks for, and what the tests run with is pinned."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PACKAGES = ("profiles/medusa_profiles", "runtime/medusa_runtime", "exporter/medusa_exporter")
MODULES = {  # of packages that are not installed where the tests run, or that several distributions bring
    "cuda": "cuda-bindings",
    "onnxruntime": "onnxruntime",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx-cu13-bindings",
}


def canonical(name: str) -> str:
    """The name of a distribution as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(lines: list[str]) -> dict[str, str]:
    """Names and lower bounds."""
    return {
        canonical(match[1]): match[2] or ""
        for line in lines
        if (match := re.match(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?\s*(?:>=\s*([0-9.]+))?", line))
    }


def project() -> dict[str, list[str]]:
    """The dependencies of the project, those of everyone under ""."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"": content["dependencies"], **content["optional-dependencies"]}


def pinned(file: str) -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def imported(file: Path) -> Iterator[str]:
    """The top-level names that a file imports, by a statement or by one of the functions that do."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "import_extra") and isinstance(node.args[0].value, str):
                yield node.args[0].value.partition(".")[0]


def foreign(package: str) -> dict[str, str]:
    """The distributions that a package imports from, and where."""
    known, found = packages_distributions(), {}
    for file in sorted((ROOT / package).rglob("*.py")):
        for module in imported(file):
            if module not in sys.stdlib_module_names and not module.startswith("medusa_"):
                name = MODULES.get(module) or known.get(module, [module])[0]
                found[canonical(name)] = str(file.relative_to(ROOT))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_is_asked_for(package: str) -> None:
    found = foreign(package)
    asked = requirements([line for lines in project().values() for line in lines])
    assert {name: where for name, where in found.items() if name not in asked} == {}
    assert found


def test_the_lock_of_a_bundle_comes_with_every_extra_that_makes_one() -> None:
    assert "filelock" in foreign("exporter/medusa_exporter")
    for extra in ("export", "tensorrt", "tensorrt-rtx"):
        assert "filelock" in requirements(project()[extra]), extra


def test_what_compare_reads_a_reference_with_comes_with_every_extra_of_tensorrt() -> None:
    assert "safetensors" in foreign("exporter/medusa_exporter")
    for extra in ("export", "tensorrt", "tensorrt-rtx"):
        assert requirements(project()[extra])["safetensors"] == requirements(project()["export"])["safetensors"], extra


def test_all_that_the_tests_run_with_is_pinned() -> None:
    pins = pinned("constraints.txt")
    asked = requirements([line for extra in ("", "cpu", "export", "test") for line in project()[extra]])
    assert sorted(asked.keys() - pins.keys()) == []


def test_the_lowest_versions_are_those_that_the_tests_can_be_run_with() -> None:
    """`make test-lowest` installs exactly these."""
    pins, extras = pinned("constraints-lowest.txt"), project()
    lines = [line for extra in ("", "cpu", "export", "structured", "tensorrt-rtx") for line in extras[extra]]
    asked = requirements([line for line in lines if "python_version < '3.11'" not in line])
    assert {name: pins.get(name) for name in asked} == asked
    assert requirements(extras["gpu"])["onnxruntime-gpu"] == asked["onnxruntime"]
    assert requirements(extras["test"])["llguidance"] == asked["llguidance"]
    for extra in ("gpu", "tensorrt"):
        assert requirements(extras[extra])["cuda-bindings"] == asked["cuda-bindings"]


def test_all_that_the_lowest_versions_are_tested_with_is_pinned() -> None:
    asked = requirements([line for extra in ("", "cpu", "export", "tensorrt-rtx", "test") for line in project()[extra]])
    assert sorted(asked.keys() - pinned("constraints-lowest.txt").keys()) == []
