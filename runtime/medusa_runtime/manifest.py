"""The manifest of a bundle, `manifest.json`: its fields, its checks, and its canonical JSON form."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from medusa_profiles.profile import NAME_PATTERN

from medusa_runtime.errors import BundleError
from medusa_runtime.facts import DIGEST, PLAIN, FileFacts, GraphFacts, HeadFacts, ModelFacts
from medusa_runtime.field_checks import (
    check_fields,
    check_int,
    check_keys,
    check_object,
    check_path,
    check_text,
    check_unique,
    refuse,
)
from medusa_runtime.graph_check import GraphCheck
from medusa_runtime.strict_json import parse_json

SCHEMA = 6
FILE_NAME = "manifest.json"
MAX_BYTES = 16 << 20
REMEDY = "copy it again, or rebuild it with medusa-export build … --force"

_ZEROS = "0" * 64
_DIGEST_AT = len(b'{\n  "digest": "')  # "digest" is the first of the sorted keys

Fact = TypeVar("Fact")


@dataclass(frozen=True)
class Manifest:
    """A checked manifest.

    Attributes:
        schema: Version of the manifest format.
        producer: Packages that built the bundle, with their versions.
        model: The decoder's name and sizes.
        heads: The number and form of the heads.
        graphs: Graphs, by key "<backend>-<precision>".
        profiles: Names of the trees; each is stored in `profiles/<name>.toml`.
        files: Size and SHA-256 of every file but the manifest, by POSIX path.
        sources: JSON that the builder records for itself; converted to what reading it back returns.
        digest: SHA-256 of the manifest's bytes with 64 zeros in place of the digest; computed if it is "".
        graph_checks: Result of validating each graph against the model, by the graph's file.

    Raises:
        BundleError: A field is invalid, or fields contradict each other.
    """

    schema: int
    producer: dict[str, str]
    model: ModelFacts
    heads: HeadFacts
    graphs: dict[str, GraphFacts]
    profiles: tuple[str, ...]
    files: dict[str, FileFacts]
    sources: dict[str, Any]
    digest: str = ""
    graph_checks: dict[str, GraphCheck] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_schema(self.schema)
        for package, version in check_object("producer", self.producer).items():
            check_text("a key of producer", package)
            check_text(f"producer.{package}", version)
        if self.heads.draft_vocabulary is not None:
            check_int("heads.draft_vocabulary", self.heads.draft_vocabulary, 1, self.model.vocab_size)
        if self.heads.count:
            check_int("heads.top_k", self.heads.top_k, 1, self.heads.draft_vocabulary or self.model.vocab_size)
        elif self.profiles:
            refuse("profiles", self.profiles, "no trees, since the bundle has no heads")
        for layer in self.heads.taps:
            check_int("a layer in heads.taps", layer, 0, self.model.layers - 1)
        for path in self.files:
            check_path("a path in files", path)
            if path == FILE_NAME:
                refuse("a path in files", path, "any file but the manifest itself")
        for name in check_unique("profiles", self.profiles):
            check_text("a name in profiles", name, NAME_PATTERN)
            if f"profiles/{name}.toml" not in self.files:
                refuse("a name in profiles", name, "a profile whose file profiles/<name>.toml is in files")
        self._check_graphs()
        object.__setattr__(self, "sources", json.loads(_to_json(check_object("sources", self.sources))))
        computed = self._body()[1]
        if self.digest not in ("", computed):
            refuse("digest", self.digest, computed)
        object.__setattr__(self, "digest", computed)

    def _check_graphs(self) -> None:
        for key, graph in (self.graphs or refuse("graphs", self.graphs, "at least one graph")).items():
            if key != graph.key:
                refuse("a key of graphs", key, f"{graph.key!r}, from its backend and precision")
            if graph.file not in self.files:
                refuse(f"the file of graph {key}", graph.file, "one of the paths in files")
            if graph.profile not in (PLAIN, *self.profiles):
                refuse(f"the profile of graph {key}", graph.profile, f"{PLAIN!r} or one of the names in profiles")
        for file in self.graph_checks:
            if file not in self.files or not file.endswith(".onnx"):
                refuse("a key of graph_checks", file, "one of the graphs in files")

    def _body(self) -> tuple[bytes, str]:
        """Return the manifest's bytes with 64 zeros in place of the digest, and the digest."""
        body = _to_json(vars(self) | {"digest": _ZEROS})
        if len(body) > MAX_BYTES:
            raise BundleError(f"the manifest takes {len(body)} bytes, expected at most {MAX_BYTES}; shorten `sources`")
        return body, hashlib.sha256(body).hexdigest()

    def to_bytes(self) -> bytes:
        """Return the manifest as canonical JSON: UTF-8, sorted keys, indented by 2, with a final newline."""
        body, digest = self._body()
        return _with_digest(body, digest)

    @classmethod
    def from_bytes(cls, data: bytes, origin: str) -> Manifest:
        """Read what `to_bytes` returned; `origin` names the file in errors. Raises BundleError for anything else."""
        try:
            return cls._from_bytes(data)
        except BundleError as error:
            raise BundleError(f"{origin}: {error}; {REMEDY}") from None

    @classmethod
    def _from_bytes(cls, data: bytes) -> Manifest:
        content = check_object("the manifest", parse_json("the manifest", data, MAX_BYTES))
        _check_schema(content.get("schema"))
        claimed = data[_DIGEST_AT : _DIGEST_AT + 64].decode("ascii", "replace")
        if content.get("digest") != claimed or not DIGEST.fullmatch(claimed):
            refuse("digest", content.get("digest"), "64 hexadecimal digits, first in the manifest")
        computed = hashlib.sha256(_with_digest(data, _ZEROS)).hexdigest()
        if claimed != computed:
            raise BundleError(f"the manifest is damaged or was edited: its digest is {claimed}, expected {computed}")
        check_keys("the manifest", content, {f.name for f in fields(cls)})
        parts: dict[str, Any] = {
            "model": _facts(ModelFacts, "model", content["model"]),
            "heads": _facts(HeadFacts, "heads", content["heads"]),
            "graphs": _all_facts(GraphFacts, "graphs", content["graphs"]),
            "profiles": _as_tuple("profiles", content["profiles"]),
            "files": _all_facts(FileFacts, "files", content["files"]),
            "graph_checks": _all_facts(GraphCheck, "graph_checks", content["graph_checks"]),
        }
        if (manifest := cls(**content | parts | {"digest": ""})).to_bytes() != data:
            raise BundleError("the manifest is not in the form that medusa-export writes")
        return manifest


def _check_schema(schema: object) -> None:
    if type(schema) is not int or schema != SCHEMA:
        raise BundleError(f"the manifest has schema {schema!r:.40}, this version of medusa-export reads {SCHEMA}")


def _as_tuple(what: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, list) or any(isinstance(item, (list, dict)) for item in value):
        refuse(what, value, "a list of plain values")
    return tuple(value)


def _facts(kind: type[Fact], what: str, value: object) -> Fact:
    """Create a fact class from a JSON object that has exactly its fields."""
    content = check_fields(what, value, kind)
    if kind is ModelFacts:
        content["eos_token_ids"] = _as_tuple(f"{what}.eos_token_ids", content["eos_token_ids"])
    if kind is HeadFacts:
        content["taps"] = _as_tuple(f"{what}.taps", content["taps"])
    if kind is GraphCheck:
        content["steps"] = _as_tuple(f"{what}.steps", content["steps"])
    return kind(**content)


def _all_facts(kind: type[Fact], what: str, value: object) -> dict[str, Fact]:
    return {key: _facts(kind, f"{what}[{key!r}]", item) for key, item in check_object(what, value).items()}


def _with_digest(data: bytes, digest: str) -> bytes:
    return data[:_DIGEST_AT] + digest.encode() + data[_DIGEST_AT + 64 :]


def _to_json(content: object) -> bytes:
    try:
        text = json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False, default=asdict)
        return (text + "\n").encode()
    except (TypeError, ValueError, RecursionError, MemoryError) as error:
        raise BundleError(f"the manifest cannot be written as JSON: {error}") from None
