"""The JSON file next to a TensorRT engine: how it was built, and what is checked before it is deserialised."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from medusa_runtime.errors import BundleError
from medusa_runtime.facts import DIGEST, FileFacts
from medusa_runtime.field_checks import check_int, check_path, check_text, refuse

MAX_BYTES = 1 << 16  # of an engine's manifest
REMEDY = "build it again with medusa-export build … --force"
_TARGET = re.compile(r"sm\d{2,3}", re.ASCII)
_VERSION = re.compile(r"\d+(\.\d+)+[a-z0-9.+]*", re.ASCII)


@dataclass(frozen=True)
class EngineManifest:
    """The manifest of one TensorRT engine.

    Attributes:
        flavour: "tensorrt" or "tensorrt-rtx".
        version: Version of the TensorRT that built the engine; only this version can run it.
        targets: GPU architectures that it runs on, such as "sm90".
        graph: SHA-256 of the ONNX file that it was built from.
        engine: SHA-256 of the engine file.
        size: Bytes of the engine file.
        precision: Precision of its weights.
        batch: Sequences of its steps, B.
        nodes: Tree nodes of its steps, T.
        rows: Rows of its steps with logits, R.
        draft: Whether its steps run the heads.
        least: Fewest rows of the past that it accepts.
        best: Rows of the past that it is optimised for.
        most: Maximum number of rows of the past that it accepts.
        seconds: Duration of the build.
        step_ms: Milliseconds of a step behind `best` rows on the GPU that built it; None if there was no GPU.
        weights: Path in the bundle and SHA-256 of each file of external data of the graph; the engine contains these
            weights.

    Raises:
        BundleError: A field is invalid.
    """

    flavour: str
    version: str
    targets: tuple[str, ...]
    graph: str
    engine: str
    size: int
    precision: str
    batch: int
    nodes: int
    rows: int
    draft: bool
    least: int
    best: int
    most: int
    seconds: float
    step_ms: float | None = None
    weights: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        check_text("an engine's flavour", self.flavour)
        check_text("an engine's version", self.version, _VERSION)
        for target in self.targets or refuse("an engine's targets", self.targets, "at least one"):
            check_text("an engine's target", target, _TARGET)
        for name in ("graph", "engine"):
            check_text(f"an engine's {name}", getattr(self, name), DIGEST)
        for name, digest in self.weights:
            check_path("a file of an engine's weights", name)
            check_text(f"the digest of an engine's {name}", digest, DIGEST)
        check_text("an engine's precision", self.precision)
        check_int("an engine's size", self.size, 1, 2**40)
        for name in ("batch", "nodes", "rows", "least", "best", "most"):
            check_int(f"an engine's {name}", getattr(self, name), 1, 2**31 - 1)
        if not self.least <= self.best <= self.most:
            refuse("an engine's rows", (self.least, self.best, self.most), "ascending numbers")
        if type(self.draft) is not bool:
            refuse("an engine's draft", self.draft, "true or false")
        for name in ("seconds", "step_ms"):
            value = getattr(self, name)
            known = value is not None or name == "seconds"
            if known and (type(value) not in (int, float) or not 0 <= value < math.inf):
                refuse(f"an engine's {name}", value, "a number of at least 0")

    def to_bytes(self) -> bytes:
        """Return the manifest as JSON."""
        content = asdict(self) | {"weights": dict(self.weights)}
        return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_file(cls, path: Path) -> EngineManifest:
        """Read the manifest file of an engine; raise BundleError if it is invalid."""
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise BundleError(f"{path} is no engine's manifest: {error}; {REMEDY}") from None
        return cls.from_bytes(data, path)

    @classmethod
    def from_bytes(cls, data: bytes, path: Path) -> EngineManifest:
        """Read what `to_bytes` wrote; `path` names the file in errors. Raises BundleError if it is invalid."""
        if len(data) > MAX_BYTES:
            raise BundleError(f"{path} is no engine's manifest: it has more than {MAX_BYTES} bytes; {REMEDY}")
        try:
            content = json.loads(data)
        except (ValueError, RecursionError, MemoryError) as error:
            raise BundleError(f"{path} is no engine's manifest: {error}; {REMEDY}") from None
        names = {field.name for field in fields(cls)}
        if not isinstance(content, dict) or content.keys() != names or not isinstance(content["targets"], list):
            raise BundleError(f"{path} is no engine's manifest: expected {', '.join(sorted(names))}; {REMEDY}")
        weights = content["weights"]
        if not isinstance(weights, dict):
            raise BundleError(f"{path}: weights is {weights!r:.80}, expected files and their digests; {REMEDY}")
        try:
            return cls(**content | {"targets": tuple(content["targets"]), "weights": tuple(weights.items())})
        except BundleError as error:
            raise BundleError(f"{path}: {error}; {REMEDY}") from None

    def changed(self, graph: str, files: Mapping[str, FileFacts]) -> str | None:
        """Return the first of the bundle's files that differs from what the engine was built from; None if none does.

        Args:
            graph: Path of the engine's ONNX file in the bundle.
            files: The bundle's files, by path.
        """
        for name, digest in ((graph, self.graph), *self.weights):
            if name not in files or files[name].sha256 != digest:
                return name
        return None

    def read(self, engine: Path, flavour: str, version: str, target: str) -> bytes:
        """Return the engine's bytes after checking that they are unchanged and can run here.

        Args:
            engine: Path of the engine file.
            flavour: "tensorrt" or "tensorrt-rtx", whichever is in use.
            version: Its installed version.
            target: Architecture of the GPU, such as "sm90".

        Raises:
            BundleError: The file was changed, or was built for another version or GPU; the message has the command
                that rebuilds it.
        """
        if (self.flavour, self.version) != (flavour, version):
            raise BundleError(
                f"{engine} was built by {self.flavour} {self.version}, which alone can run it; installed is {flavour} "
                f"{version}: install that version, or {REMEDY}"
            )
        if target not in self.targets:
            raise BundleError(f"{engine} was built for {', '.join(self.targets)}, this GPU is {target}; {REMEDY}")
        try:
            size, data = engine.stat().st_size, b""
            if size == self.size:
                with engine.open("rb") as file:
                    data = file.read(size + 1)
        except (OSError, MemoryError) as error:
            raise BundleError(f"{engine} cannot be read: {error!r}; {REMEDY}") from None
        if size != self.size:
            raise BundleError(f"{engine} has {size} bytes, expected {self.size}; {REMEDY}")
        if hashlib.sha256(data).hexdigest() != self.engine:
            raise BundleError(f"{engine} is not the engine that was built (its SHA-256 differs); {REMEDY}")
        return data
