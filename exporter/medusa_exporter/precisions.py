"""The precisions that each backend runs, and the default tree profile for each.

On a CPU a precision is that of the weights alone; on a GPU it is that of weights, activations and KV cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from medusa_profiles.profile import TreeProfile
from medusa_runtime.errors import BundleError, UnsupportedModelError
from medusa_runtime.facts import PLAIN
from medusa_runtime.profile_choice import exact_trees

from medusa_exporter.families import FAMILIES, DecoderConfig


@dataclass(frozen=True)
class WeightFormat:
    """A symmetric quantised format of weights.

    Attributes:
        bits: Bits per weight.
        block: Number of neighbouring weights of a column that share a scale.
    """

    bits: int
    block: int


# int8: blocks of 64 agree with fp32 as well as blocks of 32 (0.976 and 0.977 of the argmaxes are equal; blocks of 128:
# 0.959), and a step of four rows takes a tenth less time if the processor has VNNI (with AVX2: no difference).
# int4: blocks of 128 agree less (0.738; blocks of 32: 0.766). With blocks of 64 and 128 a single row is computed with
# other bits than the same row among several, so that a tree's answer could differ from that of plain decoding.
INT8 = WeightFormat(8, 64)

# The decoder verifies what the heads propose, so fewer bits in the heads can lower acceptance but never change a token.
# 8 bits in place of fp32 lowered acceptance by nothing that could be measured and saved 1.6 ms of an fp32 step. 4 bits
# saved at most another 1% of the step, and lowered tokens per step by 1.5 to 6% (2 to 8 nodes, 36 training prompts).
DRAFT = INT8

# The format of the embedding and the lm_head, the tables with a row for each token, in all quantised precisions, int4
# too: an lm_head of 8 bits in place of 4 lowered its mean KL divergence by a sixth (SmolLM2-135M-Instruct) and a ninth
# (Qwen2.5-Coder-0.5B-Instruct). A plain step took 6 to 7% longer, a step of eight rows up to 2% less. An embedding
# of 8 bits cost no quality that could be measured.
VOCABULARY = INT8

FORMATS: dict[str, WeightFormat | None] = {"fp32": None, "int8": INT8, "w8a8": INT8, "int4": WeightFormat(4, 32)}
ON_GPU = ("fp16", "bf16", "fp32")
PRECISIONS = {  # of each backend; the first is its default
    "ort-cpu": tuple(FORMATS),
    "ort-cuda": ON_GPU,
    "tensorrt": ON_GPU,
    "tensorrt-rtx": ON_GPU,
}

# Precisions in which the matrix multiplications of the outputs of norms and attention are of integers, with activations
# quantised by scales that are fixed in the graph (`graph.integer_matmul`). FORMATS has the format of the other weights.
FIXED_SCALES = frozenset({"w8a8"})

# Number of nodes of the default tree: the most tokens per millisecond on two cores (AVX-512 with VNNI, with and without
# AMX), but for quantised graphs among chains only, whose tokens are exactly those of plain decoding.
BEST_NODES = {"fp32": 6, "int8": 2, "w8a8": 4, "int4": 2}
BEST_NODES_ON_GPU = 64  # a step of so many rows is bound by reading the same weights as a step of one row


def choose_pairs(
    backends: Iterable[str], precisions: Iterable[str], decoder: DecoderConfig | None = None
) -> list[tuple[str, str]]:
    """Return the (backend, precision) pairs to build.

    Args:
        backends: Names of backends.
        precisions: Precisions to build; each backend gets those that it runs. Empty for each backend's default.
        decoder: The model, if it is known already.

    Raises:
        BundleError: For an unknown backend, a precision that no named backend runs, and a backend that runs none of the
            named precisions.
        UnsupportedModelError: For a pair that cannot be built for the decoder.
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
        runs = PRECISIONS[backend]
        wanted = [precision for precision in runs if precision in precisions] if precisions else runs[:1]
        if not wanted:
            raise BundleError(
                f"{backend} does not run {', '.join(precisions)}; expected at least one of {', '.join(runs)} for it"
            )
        pairs += [(backend, precision) for precision in wanted]
    if decoder is not None:
        for backend, precision in pairs:
            _check_supported(decoder, backend, precision)
    return pairs


def supported_precisions(decoder: DecoderConfig, backend: str) -> tuple[str, ...]:
    """Return the precisions in which a decoder's graph can be built for a backend."""
    return tuple(precision for precision in PRECISIONS[backend] if decoder.refusal(backend, precision) is None)


def _check_supported(decoder: DecoderConfig, backend: str, precision: str) -> None:
    if (reason := decoder.refusal(backend, precision)) is None:
        return
    others = {other: supported_precisions(decoder, other) for other in PRECISIONS}
    expected = "; ".join(f"{other} in {', '.join(kinds)}" for other, kinds in others.items() if kinds)
    raise UnsupportedModelError(
        f"{FAMILIES[decoder.family].name} is not built for {backend} in {precision}: {reason}; "
        f"expected one of: {expected}"
    )


def default_profile(backend: str, precision: str, trees: Iterable[TreeProfile]) -> str:
    """Return the default tree: the largest that does not exceed the best number of nodes, fitted trees first.

    In quantised precisions it is a chain, since only with chains the tokens are exactly those of plain decoding.
    """
    nodes = BEST_NODES[precision] if backend == "ort-cpu" else BEST_NODES_ON_GPU
    fitting = [tree for tree in exact_trees(precision, trees) if tree.size <= nodes]
    best = max(fitting, key=lambda tree: (tree.size, tree.name == f"tree-{tree.size}"), default=None)
    return PLAIN if best is None else best.name
