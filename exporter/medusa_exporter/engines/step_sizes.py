"""The step sizes that TensorRT engines are built for, the names of graph files, and the range of an engine's past."""

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

PREFILL_NODES = PREFILL_CHUNK  # tokens of a prompt in one step


@dataclass(frozen=True)
class StepSize:
    """The fixed sizes of an engine's steps. An engine depends on the size of a tree, not on its shape.

    Attributes:
        batch: Number of sequences, B.
        nodes: Number of nodes of each sequence, T.
        rows: Number of rows with logits, R; all of them are summarised.
        draft: Whether the heads run.
    """

    batch: int
    nodes: int
    rows: int
    draft: bool

    @property
    def name(self) -> str:
        """The part of its files' names: "plain", "prefill" or "t<nodes>", and "-b<batch>" for several sequences."""
        kind = f"t{self.nodes}" if self.draft else "plain" if self.nodes == PLAIN_ENGINE_NODES else "prefill"
        return kind if self.batch == 1 else f"{kind}-b{self.batch}"

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by the letters of the graph contract."""
        drafts = self.batch if self.draft else 0
        return {"B": self.batch, "T": self.nodes, "R": self.rows, "S": self.rows, "N": drafts}


def step_sizes(trees: Iterable[TreeProfile], batch: int) -> list[StepSize]:
    """Return the step sizes of plain decoding, of prefill, and of each tree size, ascending.

    Without trees, the engine of plain decoding computes the logits of all its rows, so that it can verify drafts that
    were copied from the text.
    """
    sizes = sorted({tree.size for tree in trees if tree.size > 1})
    return [
        StepSize(batch, PLAIN_ENGINE_NODES, 1 if sizes else PLAIN_ENGINE_NODES, draft=False),
        StepSize(batch, PREFILL_NODES, 1, draft=False),
        *(StepSize(batch, size, size, draft=True) for size in sizes),
    ]


def graph_file(backend: str, precision: str, size: StepSize | None = None) -> str:
    """Return the path of a graph in a bundle; `size` is that of its steps if it is for TensorRT."""
    return f"graphs/{backend}-{precision}{f'-{size.name}' if size else ''}.onnx"


def in_place_on_gpu(precision: str) -> bool:
    """Return whether ONNX Runtime writes keys and values in place on a GPU, which its operator does in 16 bits only."""
    return precision != "fp32"


def causal_file(backend: str, precision: str) -> str:
    """Return the path of the causal graph that belongs to another graph."""
    return causal_graph_name(graph_file(backend, precision))


def graph_files(pairs: Iterable[tuple[str, str]], steps: Iterable[StepSize]) -> list[str]:
    """Return the paths of all graphs for (backend, precision) pairs; TensorRT has one for each of `steps`.

    Causal graphs are among them, although some models have none.
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
    """Return the step size's name in the path of a graph of `key` ("tensorrt-fp16"); "" for any other file."""
    start, end = f"graphs/{key}-", ".onnx"
    return file[len(start) : -len(end)] if file.startswith(start) and file.endswith(end) else ""


@dataclass(frozen=True)
class Capacity:
    """The range of rows of the past that an engine accepts: the fewest, those it is optimised for, the most."""

    least: int
    best: int
    most: int


def choose_capacity(max_length: int, static: int | None) -> Capacity:
    """Return the range of lengths that the backend binds, up to `max_length`, or only the length `static`.

    Lengths are multiples of PAST_MULTIPLE; `max_length` is rounded down. Raises BundleError if that leaves
    nothing, and for a `static` that is not a multiple or exceeds it.
    """
    if static is not None:
        if static != round_past_down(static):
            more = round_past_down(static) + PAST_MULTIPLE
            raise BundleError(
                f"an engine for one length accepts a multiple of {PAST_MULTIPLE} rows, got {static}; use {more}"
            )
        if static > max_length:
            raise BundleError(
                f"an engine for {static} rows has no use if a sequence has at most {max_length} tokens; use fewer rows"
            )
        return Capacity(static, static, static)
    most = round_past_down(max_length)
    if not most:
        raise BundleError(
            f"an engine needs a past of at least {PAST_MULTIPLE} rows, got a length of {max_length}; use more"
        )
    least = min(MIN_PADDED_PAST, most)
    best = least
    while best * 2 <= min(1024, most):  # where a range costs least, compared with an engine for one length
        best *= 2
    return Capacity(least, best, most)
