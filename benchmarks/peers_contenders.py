"""The systems that peers.py compares: this project's builds and trees, and every peer in every precision."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_profiles.toml import from_toml
from peers_model import OWN_FILE

if TYPE_CHECKING:
    from medusa_runtime.bundle import Bundle

FP32, EIGHT_BIT, FOUR_BIT = "fp32", "8 bit", "4 bit"
CLASSES = (FP32, EIGHT_BIT, FOUR_BIT)
EXTRA = "extra"  # for information only: it has another precision than ours
OWN_CLASSES = {"fp32": FP32, "int8": EIGHT_BIT, "w8a8": EIGHT_BIT, "int4": FOUR_BIT}
BACKEND = "ort-cpu"
DEFAULT = "default"  # the name for the tree that a bundle recommends for a precision
INTEGERS = ("w8a8",)  # precisions in which ONNX Runtime uses AMX where there is AMX
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (("", {}), (" without AMX", {"environment": {"MEDUSA_AMX": "0"}}))
NGRAM_SIZE = 4  # tokens that have to be equal for a draft; with 2 or 3, more drafts are wrong than they save


@dataclass(frozen=True)
class Contender:
    """A system under test.

    Attributes:
        name: Its name in tables and for `--only`.
        precision_class: One of CLASSES, or EXTRA.
        own: Whether this is our own decoder.
        speculates: Whether its steps verify drafted tokens.
        plain: The contender whose tokens this one has to give: plain decoding of the same build; None for that itself.
        identity: Changes whenever a measurement would measure something else.
        job: What its worker is to open (peers_runners.py).
    """

    name: str
    precision_class: str
    own: bool
    speculates: bool
    plain: str | None
    identity: str
    job: dict[str, Any] = field(repr=False)

    def facts(self) -> dict[str, Any]:
        """Return what the results have to say about it, as a JSON object."""
        return {name: value for name, value in asdict(self).items() if name != "job"}


@dataclass(frozen=True)
class Peer:
    """A peer's build in one precision.

    Attributes:
        name: Its name, which is also its model's in `peers_model.RECIPES`.
        system: Its key in `peers_runners.RUNNERS`.
        precision_class: One of CLASSES, or EXTRA.
        speculation: The model for its n-gram speculation; None if that is not measured.
        options: Settings of the system.
    """

    name: str
    system: str
    precision_class: str
    speculation: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


PEERS = (
    Peer("genai fp32", "genai", FP32, "genai fp32 all logits"),
    Peer("genai int8 b32", "genai", EIGHT_BIT, "genai int8 b32 all logits"),
    Peer("genai int8 b64", "genai", EIGHT_BIT, "genai int8 b64 all logits"),
    Peer("genai int4 b32", "genai", FOUR_BIT, "genai int4 b32 all logits"),
    Peer("genai int4 b64", "genai", FOUR_BIT, "genai int4 b64 all logits"),
    Peer("llama.cpp F32", "llama.cpp", FP32, "llama.cpp F32"),
    Peer("llama.cpp F16", "llama.cpp", EXTRA),
    Peer("llama.cpp Q8_0", "llama.cpp", EIGHT_BIT, "llama.cpp Q8_0"),
    Peer("llama.cpp Q4_0", "llama.cpp", FOUR_BIT, "llama.cpp Q4_0"),
    Peer(OWN_FILE, "llama.cpp", EXTRA),
    Peer("OpenVINO fp32", "openvino", FP32, "OpenVINO fp32", {"INFERENCE_PRECISION_HINT": "f32"}),
    Peer("OpenVINO int8", "openvino", EIGHT_BIT, "OpenVINO int8"),
    Peer("OpenVINO int4", "openvino", FOUR_BIT, "OpenVINO int4"),
)


def own_contenders(
    bundle: Bundle, label: str, precisions: Sequence[str], trees: Sequence[str], *, amx: bool = False
) -> list[Contender]:
    """Return plain decoding and the trees of one bundle; where there is AMX, both with and without it.

    Args:
        bundle: The bundle.
        label: Part of the names, to tell several bundles apart; may be empty.
        precisions: Precisions of the bundle, keys of OWN_CLASSES.
        trees: "NAME" for all precisions or "PRECISION:NAME"; NAME is a tree of the bundle, DEFAULT, or a .toml file.
        amx: Whether the processor has AMX for 8-bit integers, which may take longer for one row than VNNI.

    Raises:
        MedusaError: There is no such tree, or it is invalid.
        OSError: A file cannot be read.
        ValueError: The bundle has a precision that belongs to no class.
    """
    if unknown := [name for name in precisions if name not in OWN_CLASSES]:
        raise ValueError(f"{bundle.root} has {', '.join(unknown)}; expected precisions of OWN_CLASSES: add a class")
    found = []
    for tree in trees:
        if (wanted := tree.rpartition(":")[0]) not in ("", *precisions):
            raise ValueError(f"--profile {tree}: expected one of {', '.join(precisions)} before the colon")
    for precision in precisions:
        build = f"medusa{label} {precision}"
        job = {"system": "medusa", "model": str(bundle.root), "precision": precision}
        tested: dict[str | None, str] = {None: build}
        for tree in trees:
            wanted, _, name = tree.rpartition(":")
            if wanted in ("", precision):
                chosen = bundle.graph(BACKEND, precision)[0].profile if name == DEFAULT else name
                if chosen != "plain":  # the default tree of a precision may be none
                    tested[chosen] = f"{build} {Path(chosen).stem}"
        for one, name in tested.items():
            text = ""
            if one and one.endswith(".toml"):
                text = Path(one).read_text(encoding="utf-8")
                from_toml(text, one)
            elif one:
                bundle.profile(one)
            for suffix, environment in VARIANTS if amx and precision in INTEGERS else VARIANTS[:1]:
                whole = job | {"tree": one} | environment
                identity = _identity(whole, bundle.manifest.digest, text)
                plain = build if name + suffix != build else None
                found.append(Contender(name + suffix, OWN_CLASSES[precision], True, bool(one), plain, identity, whole))
    return found


def peer_contenders(drafts: Sequence[int]) -> list[Contender]:
    """Return all peers, plain and with n-gram speculation of each number of drafted tokens; `model` is still a name."""
    found = []
    for peer in PEERS:
        job = {"system": peer.system, "model": peer.name, "options": peer.options, "ngram": None}
        found.append(_peer(peer.name, peer, job))
        if peer.speculation:
            for draft in drafts:
                ngram = {"model": peer.speculation, "ngram": {"size": NGRAM_SIZE, "draft": draft}}
                found.append(_peer(f"{peer.name} n-gram {draft}", peer, job | ngram))
    return found


def _peer(name: str, peer: Peer, job: dict[str, Any]) -> Contender:
    return Contender(name, peer.precision_class, False, bool(job["ngram"]), None, _identity(job), job)


def _identity(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def select(contenders: Sequence[Contender], patterns: Sequence[str]) -> list[Contender]:
    """Return the contenders whose names match one of the patterns of the shell; all if there are none.

    Raises:
        ValueError: A pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(one.name, pattern) for one in contenders):
            raise ValueError(f"--only {pattern} matches none of: {', '.join(one.name for one in contenders)}")
    return [one for one in contenders if not patterns or any(fnmatchcase(one.name, pattern) for pattern in patterns)]
