"""Mutated, truncated and swapped files of a bundle, half of them sealed with digests that fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from . import mutations
from .child import Child
from .tally import Tally, run_cases

WEIGHTED = {  # how often a kind of file is chosen
    "manifest.json": 4,
    "tokenizer/tokenizer.json": 3,
    "tokenizer/chat_template.jinja": 2,
    "tokenizer/special_tokens.json": 1,
    "graphs/ort-cpu-fp32.onnx": 5,
    "profiles/tree-8.toml": 3,
    "engines/tensorrt-fp32-t4.json": 3,
    "engines/tensorrt-fp32-t4.engine": 1,
}
STRUCTURED = (".json", ".toml")


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory, tiny_engines: Path) -> Path:
    """A folder with a bundle of every kind of file; what stands for an engine is never deserialised here."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(tiny_engines, folder / "bundle")
    add_engine(folder / "bundle")
    (folder / "scratch").mkdir()
    return folder


def test_bundles(state: Path, tallies: list[Tally]) -> None:
    """Each mutated bundle gives a typed error or the answer of its content; nothing crashes, hangs, grows or stays."""
    scratch = state.parent / f"{state.name}-scratch"
    scratch.mkdir()
    files = sorted(
        one.relative_to(state / "bundle").as_posix() for one in (state / "bundle").rglob("*") if one.is_file()
    )
    weights = [name for name in files if ".onnx.data" in name or name.endswith("shared.data")]
    files = [name for name in files if "tensorrt" not in name or "t4" in name]
    names = [name for name, weight in WEIGHTED.items() for _ in range(weight)] + weights * 2 + files
    tally = run_cases("bundles", Child("bundle_cases", state, scratch), cases(names), 10_000, 150, known)
    tallies.append(tally)
    assert sum(tally.counts.values()) >= 100
    assert not tally.findings, "\n".join(json.dumps(one) for one in smallest(tally))
    assert tally.growth < 300


def cases(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """One or two mutations of files of a bundle, and whether its digests are made to fit."""

    def of(name: str) -> st.SearchStrategy[list[Any]]:
        kinds = [mutations.bytewise, mutations.bytewise, mutations.removals, mutations.foreign]
        if name.endswith(STRUCTURED):
            kinds += [mutations.structured] * 6
        if name.endswith(".jinja"):
            kinds += [mutations.templates] * 2
        if name.endswith(".onnx"):
            kinds += [mutations.graphs] * 4
        return st.tuples(st.just(name), st.one_of(kinds).map(mutations.to_json)).map(list)

    one = st.sampled_from(names).flatmap(of)
    return st.fixed_dictionaries(
        {"mutations": st.lists(one, min_size=1, max_size=2), "seal": st.sampled_from([True, True, True, False])}
    )


def known(found: tuple[dict[str, Any], dict[str, Any]]) -> bool:
    """A crash of ONNX Runtime itself, on a graph whose digests were made to fit: see SECURITY.md."""
    case, answer = found
    graphs = all(name.startswith("graphs/") for name, _ in case["mutations"])
    return answer["outcome"] == "crash" and case["seal"] and graphs


def smallest(tally: Tally, count: int = 12) -> list[Any]:
    """The shortest findings, each with its case."""
    return sorted(tally.findings, key=lambda one: len(json.dumps(one[0])))[:count]


def add_engine(folder: Path) -> None:
    """Give a bundle of TensorRT graphs one engine, whose bytes are none."""
    import hashlib

    from medusa_exporter.engines.reuse import external_files
    from medusa_runtime.bundle import Bundle, rewrite_manifest

    from ..runtime.test_engine_manifest import DATA, FACTS

    manifest = Bundle.open(folder).manifest
    graph = manifest.files["graphs/tensorrt-fp32-t4.onnx"].sha256
    facts = replace(
        FACTS,
        flavour="tensorrt",
        version="8.6.0",
        targets=("sm90",),
        precision="fp32",
        graph=graph,
        engine=hashlib.sha256(DATA).hexdigest(),
        size=len(DATA),
        weights=tuple(
            (name, manifest.files[name].sha256) for name in external_files(folder, "graphs/tensorrt-fp32-t4.onnx")
        ),
    )
    (folder / "engines").mkdir(exist_ok=True)
    (folder / "engines/tensorrt-fp32-t4.engine").write_bytes(DATA)
    (folder / "engines/tensorrt-fp32-t4.json").write_bytes(facts.to_bytes())
    rewrite_manifest(folder, manifest)
