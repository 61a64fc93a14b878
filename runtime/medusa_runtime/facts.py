"""The entries of a manifest: facts about the model, its heads, each graph and each file.

Every class checks its fields on construction and raises BundleError for an invalid one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from medusa_profiles.node_ids import MAX_HEAD_CANDIDATES
from medusa_profiles.profile import NAME_PATTERN

from medusa_runtime.field_checks import check_int, check_path, check_text, check_unique, refuse

PLAIN = "plain"  # the profile name of plain decoding, for which the heads do not run
_INT32_MAX = 2**31 - 1
DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_BACKEND = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*", re.ASCII)
_PRECISION = re.compile(r"[a-z0-9][a-z0-9_.]*", re.ASCII)


@dataclass(frozen=True)
class ModelFacts:
    """The decoder's name and sizes.

    Attributes:
        name: Name of the model.
        family: Model type as transformers names it, such as "llama".
        layers: Number of decoder layers.
        hidden_size: Elements of a hidden state.
        attention_heads: Number of query heads.
        kv_heads: Number of key (and value) heads.
        head_dim: Elements of one attention head.
        vocab_size: Number of logits; token ids are below it.
        context: Maximum number of tokens of a sequence.
        eos_token_ids: Token ids that end an answer.
    """

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
        check_text("model.name", self.name)
        check_text("model.family", self.family)
        for field in ("layers", "attention_heads", "kv_heads", "head_dim"):
            check_int(f"model.{field}", getattr(self, field), 1, 2**16)
        for field in ("hidden_size", "vocab_size", "context"):
            check_int(f"model.{field}", getattr(self, field), 1, _INT32_MAX)
        if self.attention_heads % self.kv_heads:
            refuse("model.kv_heads", self.kv_heads, f"a divisor of attention_heads, {self.attention_heads}")
        for token in check_unique("model.eos_token_ids", self.eos_token_ids):
            check_int("a token of model.eos_token_ids", token, 0, self.vocab_size - 1)

    @property
    def kv_row(self) -> int:
        """W: elements of one token's key (or value) in one layer."""
        return self.kv_heads * self.head_dim

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Return the bytes of one token's keys and values in all layers, at `itemsize` bytes per element."""
        return 2 * self.layers * self.kv_row * itemsize


@dataclass(frozen=True)
class HeadFacts:
    """The number and form of the Medusa heads.

    Without heads (`none`) every number is 0, and the other fields are "none", empty and None.

    Attributes:
        count: Number of heads; 0 in a bundle without heads.
        layers: ResBlocks in each head.
        conditioning: "root" if the heads also read the embedding of the root token, otherwise "none".
        top_k: Candidates that each head ranks.
        taps: Decoder layers whose input the heads read too.
        trunk: Width of the gated block that all heads share; 0 if there is none.
        draft_vocabulary: Number of tokens that the heads score; None is the whole vocabulary.
    """

    count: int
    layers: int
    conditioning: Literal["none", "root"]
    top_k: int
    taps: tuple[int, ...] = ()
    trunk: int = 0
    draft_vocabulary: int | None = None

    def __post_init__(self) -> None:
        check_int("heads.count", self.count, 0, 1000)
        if not self.count:
            self._check_none()
            return
        check_int("heads.layers", self.layers, 0, 1000)
        if self.conditioning not in ("none", "root"):
            refuse("heads.conditioning", self.conditioning, "'none' or 'root'")
        check_int("heads.top_k", self.top_k, 1, MAX_HEAD_CANDIDATES // self.count)
        for layer in check_unique("heads.taps", self.taps):
            check_int("a layer in heads.taps", layer, 0, 999)
        check_int("heads.trunk", self.trunk, 0, _INT32_MAX)
        if self.draft_vocabulary is not None:
            check_int("heads.draft_vocabulary", self.draft_vocabulary, 1, _INT32_MAX)

    def _check_none(self) -> None:
        for name in ("layers", "top_k", "trunk"):
            check_int(f"heads.{name}, without heads,", getattr(self, name), 0, 0)
        if self.conditioning != "none":
            refuse("heads.conditioning, without heads,", self.conditioning, "'none'")
        if check_unique("heads.taps", self.taps):
            refuse("heads.taps, without heads,", self.taps, "no layers")
        if self.draft_vocabulary is not None:
            refuse("heads.draft_vocabulary, without heads,", self.draft_vocabulary, "None")

    @classmethod
    def none(cls) -> HeadFacts:
        """Return the facts of a bundle without heads."""
        return cls(count=0, layers=0, conditioning="none", top_k=0)


def state_size(model: ModelFacts, heads: HeadFacts) -> int:
    """Return E, the elements that the heads read for one token: hidden size * (1 + number of taps)."""
    return model.hidden_size * (1 + len(heads.taps))


@dataclass(frozen=True)
class GraphFacts:
    """One graph of a bundle.

    Attributes:
        backend: Backend that the graph variant is for.
        precision: Precision of its weights.
        file: Its path inside the bundle.
        profile: Default tree: one of the bundle's, or "plain" for plain decoding.
    """

    backend: str
    precision: str
    file: str
    profile: str = PLAIN

    def __post_init__(self) -> None:
        check_text("a graph's backend", self.backend, _BACKEND)
        check_text("a graph's precision", self.precision, _PRECISION)
        check_path("a graph's file", self.file)
        check_text("a graph's profile", self.profile, NAME_PATTERN)

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
        check_int("a file's size", self.size, 0, 2**63 - 1)
        check_text("a file's sha256", self.sha256, DIGEST)
