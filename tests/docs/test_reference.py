"""The reference pages that are written by hand name every field, tensor and extra that the code has."""

import re
from dataclasses import fields

import pytest
from medusa_exporter.cli.exit_codes import ExitCode
from medusa_runtime import contract
from medusa_runtime.engine_manifest import EngineManifest
from medusa_runtime.facts import FileFacts, GraphFacts, HeadFacts, ModelFacts
from medusa_runtime.graph_check import GraphCheck
from medusa_runtime.manifest import SCHEMA, Manifest

from .pages import ROOT

BUNDLE = (ROOT / "docs/reference/bundle.md").read_text(encoding="utf-8")
GRAPH = (ROOT / "docs/reference/graph.md").read_text(encoding="utf-8")
ENVIRONMENT = (ROOT / "docs/reference/environment.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", [Manifest, ModelFacts, HeadFacts, GraphFacts, FileFacts, GraphCheck, EngineManifest])
def test_every_field_of_a_bundle_is_described(kind):
    assert [field.name for field in fields(kind) if f"`{field.name}`" not in BUNDLE] == []
    assert f"The schema number is {SCHEMA};" in BUNDLE


def test_every_tensor_of_the_graph_contract_is_described():
    named = {
        value for name, value in vars(contract).items() if name.isupper() and isinstance(value, str) and value.islower()
    }
    numbered = {name("i") for name in (contract.past_key, contract.past_value, contract.new_key, contract.present_key)}
    assert [name for name in sorted(named | numbered) if f"`{name}`" not in GRAPH] == []


def test_every_extra_is_described():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = re.findall(r"^([a-z-]+) = \[", table, flags=re.MULTILINE)
    assert [extra for extra in extras if f"| `{extra}` |" not in ENVIRONMENT] == []


def test_every_environment_variable_is_described():
    read = re.compile(r"environ(?:\.get\(|\[)\s*[\"']([A-Z_]+)[\"']")
    found = set()
    for package in ("profiles", "runtime", "exporter", "tests/fuzz", "tests/real"):
        for file in (ROOT / package).rglob("*.py"):
            found |= set(read.findall(file.read_text(encoding="utf-8")))
    assert [name for name in sorted(found - {"TMPDIR"}) if f"`{name}`" not in ENVIRONMENT] == []


def test_every_exit_code_is_described():
    page = (ROOT / "docs/reference/exit-codes.md").read_text(encoding="utf-8")
    assert [code for code in ExitCode if f"\n| {int(code)} | " not in page] == []
