"""Which engines a bundle needs: one for each number of nodes, whatever the trees look like."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from medusa_profiles.profile import TreeProfile
from medusa_runtime import tensorrt_library
from medusa_runtime.backends.base import PREFILL_CHUNK
from medusa_runtime.backends.ort_cuda import causal_graph_name
from medusa_runtime.backends.step_shape import MIN_PADDED_PAST
from medusa_runtime.backends.tensorrt import PAST_MULTIPLE, PLAIN_ENGINE_NODES, round_past_down
from medusa_runtime.errors import BundleError

PREFILL_NODES = PREFILL_CHUNK  # tokens of a prompt that one step takes


@dataclass(frozen=True)
class StepSize:
    """The sizes of one engine's steps: B sequences, T nodes, R rows with logits, whether the heads run."""

    batch: int
    nodes: int
    rows: int
    draft: bool

    @property
    def name(self) -> str:
        """What its files are called: "plain", "prefill" or "t<nodes>"; with several sequences "-b<batch>" behind it."""
        kind = f"t{self.nodes}" if self.draft else "plain" if self.nodes == PLAIN_ENGINE_NODES else "prefill"
        return kind if self.batch == 1 else f"{kind}-b{self.batch}"

    @property
    def sizes(self) -> dict[str, int]:
        """By the contract's letters."""
        return {"B": self.batch, "T": self.nodes, "R": self.rows, "N": self.batch if self.draft else 0}


def step_sizes(trees: Iterable[TreeProfile], batch: int) -> list[StepSize]:
    """Plain decoding, prefill, and one for each size of the trees, ascending."""
    sizes = sorted({tree.size for tree in trees if tree.size > 1})
    return [
        StepSize(batch, PLAIN_ENGINE_NODES, 1, draft=False),
        StepSize(batch, PREFILL_NODES, 1, draft=False),
        *(StepSize(batch, size, size, draft=True) for size in sizes),
    ]


def graph_file(backend: str, precision: str, size: StepSize | None = None) -> str:
    """Where a graph lies in a bundle; size: of the steps that one for TensorRT is for."""
    return f"graphs/{backend}-{precision}{f'-{size.name}' if size else ''}.onnx"


def in_place_on_gpu(precision: str) -> bool:
    """Whether ONNX Runtime writes keys and values in place on a GPU: its operator for that knows 16 bits alone."""
    return precision != "fp32"


def causal_file(backend: str, precision: str) -> str:
    """Where the graph for tokens in a row lies, of a graph that has one."""
    return causal_graph_name(graph_file(backend, precision))


def graph_files(pairs: Iterable[tuple[str, str]], steps: Iterable[StepSize]) -> list[str]:
    """Every graph's file, for backends and precisions; TensorRT has one for each of `steps`.

    That for tokens in a row is among them though some models lack it.
    """
    sizes, files = list(steps), []
    for backend, precision in pairs:
        files += [
            graph_file(backend, precision, size) for size in (sizes if backend in tensorrt_library.MODULES else [None])
        ]
        if backend == "ort-cuda" and in_place_on_gpu(precision):
            files.append(causal_file(backend, precision))
    return files


def step_name(file: str, key: str) -> str:
    """Return the name of the step that a bundle's file is a graph for, of the graphs of `key`; "" for another file."""
    start, end = f"graphs/{key}-", ".onnx"
    return file[len(start) : -len(end)] if file.startswith(start) and file.endswith(end) else ""


@dataclass(frozen=True)
class Capacity:
    """How many rows of the past an engine takes: the fewest, those it is tuned for, the most."""

    least: int
    best: int
    most: int


def capacity(max_length: int, static: int | None) -> Capacity:
    """Range over the lengths that a backend binds, up to `max_length`, or be one length where `static` names it.

    Lengths are multiples of PAST_MULTIPLE; `max_length` is cut to that. Raises BundleError where nothing is left of it,
    and for a `static` that is not one, or more than it.
    """
    if static is not None:
        if static != round_past_down(static):
            more = round_past_down(static) + PAST_MULTIPLE
            raise BundleError(
                f"an engine for one length takes a multiple of {PAST_MULTIPLE} rows, got {static}; take {more}"
            )
        if static > max_length:
            raise BundleError(
                f"an engine for {static} rows has no use where a sequence comes to {max_length}; take fewer"
            )
        return Capacity(static, static, static)
    most = round_past_down(max_length)
    if not most:
        raise BundleError(
            f"engines read a past of {PAST_MULTIPLE} rows at least, got a length of {max_length}; give more"
        )
    least = min(MIN_PADDED_PAST, most)
    best = least
    while best * 2 <= min(1024, most):  # where a range costs least beside an engine of one length
        best *= 2
    return Capacity(least, best, most)
