"""Engines in a bundle: hashed when they are loaded, or where somebody asks for all, and never believed before."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from medusa_runtime.bundle import Bundle, write_manifest
from medusa_runtime.errors import BundleError
from medusa_runtime.facts import GraphFacts

from .test_bundle import HEADS, MODEL
from .test_engine_manifest import DATA, FACTS

ENGINE = "engines/tensorrt-fp16-t64.engine"
GRAPH = "graphs/tensorrt-fp16-t64.onnx"
CONTENT = {
    "graphs/tensorrt-fp16-plain.onnx": b"plain graph",
    GRAPH: b"graph",
    "graphs/shared.data": b"weights of the model",
    f"{GRAPH}.data": b"weights of the heads",
}
DIGESTS = {name: hashlib.sha256(data).hexdigest() for name, data in CONTENT.items()}
MADE_FROM: dict[str, object] = {
    "graph": DIGESTS[GRAPH],
    "weights": tuple((name, DIGESTS[name]) for name in ("graphs/shared.data", f"{GRAPH}.data")),
}


def build(folder: Path, **other: object) -> Path:
    for name in ("graphs", "engines"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, data in CONTENT.items():
        (folder / name).write_bytes(data)
    (folder / ENGINE).write_bytes(DATA)
    (folder / ENGINE).with_suffix(".json").write_bytes(replace(FACTS, **MADE_FROM | other).to_bytes())
    graphs = {"tensorrt-fp16": GraphFacts("tensorrt", "fp16", "graphs/tensorrt-fp16-plain.onnx")}
    write_manifest(folder, producer={}, model=MODEL, heads=HEADS, graphs=graphs, profiles=[], sources={})
    return folder


def test_a_flipped_byte_is_found_before_the_engine_is_loaded(tmp_path: Path) -> None:
    folder = build(tmp_path / "b")
    (folder / ENGINE).write_bytes(DATA[:-1] + b"!")
    [(facts, path)] = Bundle.open(folder).engines("tensorrt")
    with pytest.raises(BundleError, match="is not the engine that was built"):
        facts.read(path, "tensorrt", "8.6.0", "sm90")
    with pytest.raises(BundleError, match=rf"{ENGINE} has SHA-256 .*, expected"):
        Bundle.open(folder, weights=True)


def test_an_engine_cut_short_is_refused_at_once(tmp_path: Path) -> None:
    folder = build(tmp_path / "b")
    (folder / ENGINE).write_bytes(DATA[:-1])
    with pytest.raises(BundleError, match=rf"{ENGINE} has 8 bytes, expected 9"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    "other", [{"engine": hashlib.sha256(b"another").hexdigest()}, {"flavour": "tensorrt-rtx"}, {"precision": "fp32"}]
)
def test_what_lies_beside_an_engine_must_tell_of_it(tmp_path: Path, other: dict[str, object]) -> None:
    with pytest.raises(BundleError, match=f"describes another engine than {ENGINE}"):
        Bundle.open(build(tmp_path / "b", **other)).engines("tensorrt")


def test_what_lies_beside_an_engine_is_read_as_it_was_checked(tmp_path: Path) -> None:
    folder = build(tmp_path / "b")
    bundle = Bundle.open(folder)
    (folder / ENGINE).with_suffix(".json").write_bytes(replace(FACTS, seconds=99.0).to_bytes())
    with pytest.raises(BundleError, match=r"tensorrt-fp16-t64\.json has .* was changed after the bundle was opened"):
        bundle.engines("tensorrt")


@pytest.mark.parametrize("changed", [GRAPH, f"{GRAPH}.data", "graphs/shared.data"])
def test_an_engine_of_another_graph_or_other_weights_is_refused(tmp_path: Path, changed: str) -> None:
    folder = build(tmp_path / "b")
    assert len(Bundle.open(folder).engines("tensorrt")) == 1
    (folder / changed).write_bytes(b"another of that name")
    manifest = Bundle.open(build(tmp_path / "other")).manifest
    parts = {name: getattr(manifest, name) for name in ("producer", "model", "heads", "graphs", "profiles", "sources")}
    write_manifest(folder, **parts)
    words = rf"{ENGINE} was built from another {changed} than the bundle's.*: medusa-export engines "
    with pytest.raises(BundleError, match=words):
        Bundle.open(folder, weights=True).engines("tensorrt")


def test_an_engine_whose_graph_is_gone_is_refused(tmp_path: Path) -> None:
    folder = build(tmp_path / "b", weights=(("graphs/gone.data", "a" * 64),))
    with pytest.raises(BundleError, match=r"was built from another graphs/gone\.data than the bundle's"):
        Bundle.open(folder).engines("tensorrt")
