"""The precisions that each backend runs: of weights alone on a CPU, of weights, activations and KV rows on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from medusa_profiles.profile import TreeProfile
from medusa_runtime.errors import BundleError, UnsupportedModelError
from medusa_runtime.facts import PLAIN

from medusa_exporter.families import FAMILIES, Decoder


@dataclass(frozen=True)
class WeightFormat:
    """How weights are kept: bits each, and how many neighbours in a column share a scale; symmetric around zero."""

    bits: int
    block: int


# int8: blocks of 64 are as near to fp32 as blocks of 32 (0.976 and 0.977 of the argmaxes, 128: 0.959), and a step of
# four rows is a tenth faster where the processor has VNNI (AVX2: no difference). int4: those of 128 agree less (0.738,
# 32: 0.766), and with blocks of 64 too one row alone has other bits than among others, so a tree would part from plain.
INT8 = WeightFormat(8, 64)

# The heads only guess: whatever they are kept in, the decoder verifies, so few bits cost guesses and never tokens. 8
# bits in place of fp32 cost none that could be measured and take 1.6 ms off a fp32 step; 4 bits took no more than 1%
# off that, and 1.5 to 6% of the tokens a step (2 to 8 nodes, 36 training prompts).
DRAFT = INT8

FORMATS: dict[str, WeightFormat | None] = {"fp32": None, "int8": INT8, "w8a8": INT8, "int4": WeightFormat(4, 32)}
ON_GPU = ("fp16", "bf16", "fp32")
PRECISIONS = {  # of each backend; the first where none is named
    "ort-cpu": tuple(FORMATS),
    "ort-cuda": ON_GPU,
    "tensorrt": ON_GPU,
    "tensorrt-rtx": ON_GPU,
}

# Precisions in which products of what norms and attention give are of whole numbers, activations under fixed scales
# (`graph.integer_matmul`); FORMATS says what the other products are in.
FIXED_SCALES = frozenset({"w8a8"})

# Nodes of the tree with the most tokens per millisecond. On a CPU: two cores (AVX-512 with VNNI), measured on training
# prompts; 1 is plain decoding, which no tree beats in int4: its second row costs a third of a step, the heads a sixth.
BEST_NODES = {"fp32": 6, "int8": 2, "w8a8": 2, "int4": 1}
BEST_NODES_ON_GPU = 64  # a step of so many rows waits for the same weights as one of a single row


def choose(backends: Iterable[str], precisions: Iterable[str], decoder: Decoder | None = None) -> list[tuple[str, str]]:
    """Return the (backend, precision) pairs to build: of the precisions named, those that each backend runs.

    Without any each backend gets its first. decoder: the model, where it is known. Raises BundleError for an unknown
    backend, a precision that none of them runs, and a backend that runs none of those named; UnsupportedModelError for
    a pair that is not built of the decoder.
    """
    backends, precisions = tuple(dict.fromkeys(backends)), tuple(dict.fromkeys(precisions))
    for backend in backends:
        if backend not in PRECISIONS:
            raise BundleError(f"unknown backend {backend!r}; expected one of {', '.join(PRECISIONS)}")
    known = list(dict.fromkeys(precision for backend in backends for precision in PRECISIONS[backend]))
    for precision in precisions:
        if precision not in known:
            raise BundleError(
                f"no precision {precision!r} on {', '.join(backends)}; expected one of {', '.join(known)}"
            )
    pairs = []
    for backend in backends:
        served = PRECISIONS[backend]
        wanted = [precision for precision in served if precision in precisions] if precisions else served[:1]
        if not wanted:
            raise BundleError(
                f"{backend} does not run {', '.join(precisions)}; expected at least one of {', '.join(served)} for it"
            )
        pairs += [(backend, precision) for precision in wanted]
    if decoder is not None:
        for backend, precision in pairs:
            _check_served(decoder, backend, precision)
    return pairs


def served(decoder: Decoder, backend: str) -> tuple[str, ...]:
    """The precisions in which a graph of a decoder is built for a backend."""
    return tuple(precision for precision in PRECISIONS[backend] if decoder.refusal(backend, precision) is None)


def _check_served(decoder: Decoder, backend: str, precision: str) -> None:
    if (reason := decoder.refusal(backend, precision)) is None:
        return
    others = {other: served(decoder, other) for other in PRECISIONS}
    expected = "; ".join(f"{other} in {', '.join(kinds)}" for other, kinds in others.items() if kinds)
    raise UnsupportedModelError(
        f"{FAMILIES[decoder.family].name} is not built for {backend} in {precision}: {reason}; "
        f"expected one of: {expected}"
    )


def default_profile(backend: str, precision: str, trees: Iterable[TreeProfile]) -> str:
    """Name the tree to take where none is named: the largest of the best number of nodes at most, fitted ones first."""
    nodes = BEST_NODES[precision] if backend == "ort-cpu" else BEST_NODES_ON_GPU
    fitting = [tree for tree in trees if tree.size <= nodes]
    best = max(fitting, key=lambda tree: (tree.size, tree.name == f"tree-{tree.size}"), default=None)
    return PLAIN if best is None else best.name
