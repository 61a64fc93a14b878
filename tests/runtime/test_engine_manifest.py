"""An engine is what its manifest says, and runs here, or not a byte of it is deserialised."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from medusa_runtime.engine_manifest import EngineManifest
from medusa_runtime.errors import BundleError

DATA = b"an engine"
FACTS = EngineManifest(
    flavour="tensorrt",
    version="8.6.0",
    targets=("sm90",),
    graph="a" * 64,
    engine=hashlib.sha256(DATA).hexdigest(),
    size=len(DATA),
    precision="fp16",
    batch=1,
    nodes=64,
    rows=64,
    draft=True,
    least=256,
    best=1024,
    most=8192,
    seconds=12.5,
    weights=(("graphs/shared.data", "b" * 64), ("graphs/tensorrt-fp16-t64.onnx.data", "c" * 64)),
)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "t64.engine"
    path.write_bytes(DATA)
    path.with_suffix(".json").write_bytes(FACTS.to_bytes())
    return path


def test_what_was_written_is_read(engine: Path) -> None:
    facts = EngineManifest.from_file(engine.with_suffix(".json"))
    assert facts == FACTS
    assert facts.read(engine, "tensorrt", "8.6.0", "sm90") == DATA


@pytest.mark.parametrize(
    ("here", "message"),
    [
        (("tensorrt", "10.1.0", "sm90"), r"was built by tensorrt 8\.6\.0, .* installed is tensorrt 10\.1\.0: install"),
        (("tensorrt-rtx", "8.6.0", "sm90"), "installed is tensorrt-rtx"),
        (("tensorrt", "8.6.0", "sm80"), "was built for sm90, this GPU is sm80; build it again"),
    ],
)
def test_a_foreign_engine_is_refused(engine: Path, here: tuple[str, str, str], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        FACTS.read(engine, *here)


def test_a_truncated_or_tampered_engine_is_refused(engine: Path) -> None:
    engine.write_bytes(DATA[:-1])
    with pytest.raises(BundleError, match="has 8 bytes, expected 9; build it again with medusa-export build … --force"):
        FACTS.read(engine, "tensorrt", "8.6.0", "sm90")
    engine.write_bytes(b"AN ENGINE")
    with pytest.raises(BundleError, match="is not the engine that was built"):
        FACTS.read(engine, "tensorrt", "8.6.0", "sm90")
    engine.unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        FACTS.read(engine, "tensorrt", "8.6.0", "sm90")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("targets", []),
        ("targets", ["hopper"]),
        ("targets", "sm90"),
        ("graph", "A" * 64),
        ("version", "8"),
        ("nodes", 0),
        ("draft", 1),
        ("least", 2048),
        ("seconds", "long"),
        ("seconds", None),
        ("step_ms", "short"),
        ("step_ms", -1.0),
        ("step_ms", float("nan")),
        ("size", 1.5),
    ],
)
def test_a_manifest_that_does_not_hold_is_refused(engine: Path, field: str, value: object) -> None:
    file = engine.with_suffix(".json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(BundleError, match=f"{file.name}.*build it again"):
        EngineManifest.from_file(file)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_what_is_no_manifest_is_refused(engine: Path, content: bytes) -> None:
    file = engine.with_suffix(".json")
    file.write_bytes(content)
    with pytest.raises(BundleError, match="is no engine's manifest"):
        EngineManifest.from_file(file)


def test_facts_must_hold_when_they_are_made() -> None:
    assert replace(FACTS, step_ms=2.5).step_ms == 2.5
    with pytest.raises(BundleError, match="ascending"):
        replace(FACTS, least=2000)
