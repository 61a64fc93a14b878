"""What a bundle says about itself: `manifest.json`, checked before any word of it is believed.

Every class here checks its fields when it is made and raises BundleError for what does not hold.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NoReturn, TypeVar

from medusa_profiles.profile import NAME_PATTERN

from medusa_runtime.errors import BundleError

SCHEMA = 2
FILE_NAME = "manifest.json"
MAX_BYTES = 16 << 20
REMEDY = "copy it again, or rebuild it with medusa-export build … --force"

_INT32_MAX = 2**31 - 1
_ZEROS = "0" * 64
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_BACKEND = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*", re.ASCII)
_PRECISION = re.compile(r"[a-z0-9][a-z0-9_.]*", re.ASCII)
_DIGEST_AT = len(b'{\n  "digest": "')  # "digest" is the first of the sorted keys

Fact = TypeVar("Fact")


def _wrong(what: str, got: object, expected: str) -> NoReturn:
    raise BundleError(f"{what} is {got!r:.80}, expected {expected}")


def _whole(what: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:  # bool is refused too
        _wrong(what, value, f"a whole number from {least} to {most}")


def _text(what: str, value: object, pattern: re.Pattern[str] | None = None) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 1000 or not value.isprintable():
        _wrong(what, value, "a text of 1 to 1000 printable characters")
    if pattern is not None and not pattern.fullmatch(value):
        _wrong(what, value, f"a text of the form {pattern.pattern}")
    return value


def _mapping(what: str, value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else _wrong(what, value, "an object")


def check_path(what: str, value: object) -> None:
    """Refuse every path but a relative POSIX one that stays below the folder it starts from (BundleError)."""
    path = _text(what, value)
    if "\\" in path or ":" in path or any(part in ("", ".", "..") for part in path.split("/")):
        _wrong(what, path, "a relative path with '/' between its parts that stays inside the bundle")


@dataclass(frozen=True)
class ModelFacts:
    """The decoder's shape, all counts; `context` counts tokens, token ids are below `vocab_size`."""

    name: str
    family: str
    layers: int
    hidden_size: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context: int
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        _text("model.name", self.name)
        _text("model.family", self.family)
        for field in ("layers", "attention_heads", "kv_heads", "head_dim"):
            _whole(f"model.{field}", getattr(self, field), 1, 2**16)
        for field in ("hidden_size", "vocab_size", "context"):
            _whole(f"model.{field}", getattr(self, field), 1, _INT32_MAX)
        if self.attention_heads % self.kv_heads:
            _wrong("model.kv_heads", self.kv_heads, f"a divisor of attention_heads, {self.attention_heads}")
        for token in _items("model.eos_token_ids", self.eos_token_ids):
            _whole("a token of model.eos_token_ids", token, 0, self.vocab_size - 1)

    @property
    def kv_row(self) -> int:
        """Elements of one token's K row (or V row) of one layer."""
        return self.kv_heads * self.head_dim

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes that one token takes in the KV cache, K and V of all layers, at `itemsize` bytes an element."""
        return 2 * self.layers * self.kv_row * itemsize


@dataclass(frozen=True)
class HeadFacts:
    """The Medusa heads: how many, ResBlocks in each, what they see besides h, candidates that each one ranks.

    taps: decoder layers whose input they see too. trunk: width of the gated block in front of all heads, 0 for none.
    draft_vocabulary: how many tokens they score, None for all.
    """

    count: int
    layers: int
    conditioning: Literal["none", "root"]
    top_k: int
    taps: tuple[int, ...] = ()
    trunk: int = 0
    draft_vocabulary: int | None = None

    def __post_init__(self) -> None:
        _whole("heads.count", self.count, 1, 1000)
        _whole("heads.layers", self.layers, 0, 1000)
        if self.conditioning not in ("none", "root"):
            _wrong("heads.conditioning", self.conditioning, "'none' or 'root'")
        _whole("heads.top_k", self.top_k, 1, _INT32_MAX // self.count)
        for layer in _items("heads.taps", self.taps):
            _whole("a layer in heads.taps", layer, 0, 999)
        _whole("heads.trunk", self.trunk, 0, _INT32_MAX)
        if self.draft_vocabulary is not None:
            _whole("heads.draft_vocabulary", self.draft_vocabulary, 1, _INT32_MAX)


def state_size(model: ModelFacts, heads: HeadFacts) -> int:
    """Elements that the heads see of one token: the hidden size, and as much again for every tap (S)."""
    return model.hidden_size * (1 + len(heads.taps))


@dataclass(frozen=True)
class GraphFacts:
    """One graph: the backend whose dialect it speaks, the precision of its weights, its file in the bundle."""

    backend: str
    precision: str
    file: str

    def __post_init__(self) -> None:
        _text("a graph's backend", self.backend, _BACKEND)
        _text("a graph's precision", self.precision, _PRECISION)
        check_path("a graph's file", self.file)

    @property
    def key(self) -> str:
        """The graph's key in the manifest: "<backend>-<precision>"."""
        return f"{self.backend}-{self.precision}"


@dataclass(frozen=True)
class FileFacts:
    """One file: its size in bytes and its SHA-256 in lower-case hexadecimal digits."""

    size: int
    sha256: str

    def __post_init__(self) -> None:
        _whole("a file's size", self.size, 0, 2**63 - 1)
        _text("a file's sha256", self.sha256, _DIGEST)


@dataclass(frozen=True)
class Manifest:
    """All that a bundle claims about itself.

    `producer` maps a package to its version, `graphs` a graph's key to its facts, `files` the POSIX path of every file
    but the manifest to its facts. Each name in `profiles` stands for `profiles/<name>.toml`. `sources` is JSON that
    the builder wrote for itself. `digest` is the SHA-256 over the manifest's bytes with 64 zeros in the digest's place;
    leave it out to have it computed. `sources` is brought into the form in which JSON gives it back.
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

    def __post_init__(self) -> None:
        _check_schema(self.schema)
        for package, version in _mapping("producer", self.producer).items():
            _text("a key of producer", package)
            _text(f"producer.{package}", version)
        if self.heads.draft_vocabulary is not None:
            _whole("heads.draft_vocabulary", self.heads.draft_vocabulary, 1, self.model.vocab_size)
        _whole("heads.top_k", self.heads.top_k, 1, self.heads.draft_vocabulary or self.model.vocab_size)
        for layer in self.heads.taps:
            _whole("a layer in heads.taps", layer, 0, self.model.layers - 1)
        for path in self.files:
            check_path("a path in files", path)
            if path == FILE_NAME:
                _wrong("a path in files", path, "any file but the manifest itself")
        for key, graph in (self.graphs or _wrong("graphs", self.graphs, "at least one graph")).items():
            if key != graph.key:
                _wrong("a key of graphs", key, f"{graph.key!r}, as its backend and precision say")
            if graph.file not in self.files:
                _wrong(f"the file of graph {key}", graph.file, "one of the paths in files")
        for name in _items("profiles", self.profiles):
            _text("a name in profiles", name, NAME_PATTERN)
            if f"profiles/{name}.toml" not in self.files:
                _wrong("a name in profiles", name, "a profile whose file profiles/<name>.toml is in files")
        object.__setattr__(self, "sources", json.loads(_to_json(_mapping("sources", self.sources))))
        computed = self._body()[1]
        if self.digest not in ("", computed):
            _wrong("digest", self.digest, computed)
        object.__setattr__(self, "digest", computed)

    def _body(self) -> tuple[bytes, str]:
        """Return the manifest's bytes with 64 zeros for a digest, and the digest that belongs there."""
        body = _to_json(vars(self) | {"digest": _ZEROS})
        if len(body) > MAX_BYTES:
            raise BundleError(f"the manifest takes {len(body)} bytes, expected at most {MAX_BYTES}; shorten `sources`")
        return body, hashlib.sha256(body).hexdigest()

    def to_bytes(self) -> bytes:
        """Write the manifest as canonical JSON: UTF-8, sorted keys, indented by 2, a newline at the end."""
        body, digest = self._body()
        return _with_digest(body, digest)

    @classmethod
    def from_bytes(cls, data: bytes, origin: str) -> Manifest:
        """Read what `to_bytes` wrote; `origin` names the place in errors. Raises BundleError for anything else."""
        try:
            return cls._from_bytes(data)
        except BundleError as error:
            raise BundleError(f"{origin}: {error}; {REMEDY}") from None

    @classmethod
    def _from_bytes(cls, data: bytes) -> Manifest:
        content = _mapping("the manifest", _from_json(data))
        _check_schema(content.get("schema"))
        claimed = data[_DIGEST_AT : _DIGEST_AT + 64].decode("ascii", "replace")
        if content.get("digest") != claimed or not _DIGEST.fullmatch(claimed):
            _wrong("digest", content.get("digest"), "64 hexadecimal digits, first in the manifest")
        computed = hashlib.sha256(_with_digest(data, _ZEROS)).hexdigest()
        if claimed != computed:
            raise BundleError(f"the manifest is damaged or was edited: its digest is {claimed}, expected {computed}")
        _check_keys("the manifest", content, {f.name for f in fields(cls)})
        parts: dict[str, Any] = {
            "model": _facts(ModelFacts, "model", content["model"]),
            "heads": _facts(HeadFacts, "heads", content["heads"]),
            "graphs": _all_facts(GraphFacts, "graphs", content["graphs"]),
            "profiles": _as_tuple("profiles", content["profiles"]),
            "files": _all_facts(FileFacts, "files", content["files"]),
        }
        if (manifest := cls(**content | parts | {"digest": ""})).to_bytes() != data:
            raise BundleError("the manifest is not in the form that medusa-export writes")
        return manifest


def _check_schema(schema: object) -> None:
    if type(schema) is not int or schema != SCHEMA:
        raise BundleError(f"the manifest has schema {schema!r:.40}, this version of medusa-export reads {SCHEMA}")


def _items(what: str, values: object) -> tuple[Any, ...]:
    if not isinstance(values, tuple) or len(set(values)) != len(values):
        _wrong(what, values, "a tuple without repetitions")
    return values


def _as_tuple(what: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, list) or any(isinstance(item, (list, dict)) for item in value):
        _wrong(what, value, "a list of plain values")
    return tuple(value)


def _check_keys(what: str, content: dict[str, Any], expected: set[str]) -> None:
    if missing := sorted(expected - content.keys()):
        raise BundleError(f"{what} lacks the key {missing[0]!r}")
    if unknown := sorted(content.keys() - expected):
        _wrong(f"a key of {what}", unknown[0], f"one of {', '.join(sorted(expected))}")


def _facts(kind: type[Fact], what: str, value: object) -> Fact:
    """Make one of the fact classes from a JSON object that has exactly its fields."""
    content = dict(_mapping(what, value))
    _check_keys(what, content, {f.name for f in fields(kind)})  # type: ignore[arg-type]
    if kind is ModelFacts:
        content["eos_token_ids"] = _as_tuple(f"{what}.eos_token_ids", content["eos_token_ids"])
    if kind is HeadFacts:
        content["taps"] = _as_tuple(f"{what}.taps", content["taps"])
    return kind(**content)


def _all_facts(kind: type[Fact], what: str, value: object) -> dict[str, Fact]:
    return {key: _facts(kind, f"{what}[{key!r}]", item) for key, item in _mapping(what, value).items()}


def _with_digest(data: bytes, digest: str) -> bytes:
    return data[:_DIGEST_AT] + digest.encode() + data[_DIGEST_AT + 64 :]


def _to_json(content: object) -> bytes:
    try:
        text = json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False, default=asdict)
        return (text + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BundleError(f"the manifest cannot be written as JSON: {error}") from None


def _from_json(data: bytes) -> Any:
    """Parse strict JSON: bounded, UTF-8, no key twice, no NaN or infinity, no nesting beyond Python's own limit."""
    if len(data) > MAX_BYTES:
        raise BundleError(f"the manifest has more than {MAX_BYTES} bytes")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(content := dict(pairs)) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return content

    def number(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number")

    try:
        return json.loads(data.decode(), object_pairs_hook=once, parse_constant=number)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"the manifest is not valid JSON: {error}") from None
