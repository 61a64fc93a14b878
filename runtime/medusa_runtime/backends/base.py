"""What a backend is: it holds KV arenas and runs one step of the graph at a time.

Shapes: B sequences, T nodes, R rows with logits, V vocabulary, capacity rows in each arena.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from medusa_runtime import contract

if TYPE_CHECKING:
    from medusa_runtime.exclusive import ExclusiveUse
    from medusa_runtime.facts import HeadFacts, ModelFacts

IntArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float32]
PREFILL_CHUNK = 256  # tokens of a prompt that a step takes, usually
MAX_PREFILL_CHUNK = 1024  # and at most, in any backend: so many rows behind the context a graph has room for
StepOutputs = dict[str, FloatArray | IntArray]  # by the names of `medusa_runtime.contract`, in its order


@dataclass(frozen=True, eq=False)
class Step:
    """The inputs of one step (`medusa_runtime.contract`), but for the past, which the backend holds.

    Run it again and again with other numbers in its arrays: a backend binds them where they lie, once, for as long as
    the step lives. `draft` says whether the heads run, on the hidden row that the last commit kept.
    """

    input_ids: IntArray  # (B, T): literal tokens, or -1 - (head * top_k + rank)
    position_ids: IntArray  # (B, T)
    tree_mask: BoolArray  # (B, T, T)
    past_length: IntArray  # (B,)
    logit_rows: IntArray  # (B, R)
    draft: bool


def literal_step(ids: IntArray, length: int, logit_rows: IntArray) -> Step:
    """The step of one sequence's literal tokens (T,) in a row, behind a past of `length` rows; no draft.

    logit_rows (R,): the rows whose logits are wanted.
    """
    T = len(ids)
    return Step(
        input_ids=ids[None],
        position_ids=np.arange(length, length + T, dtype=np.int32)[None],
        tree_mask=np.tri(T, dtype=np.bool_)[None],
        past_length=np.array([length], dtype=np.int32),
        logit_rows=logit_rows[None],
        draft=False,
    )


@dataclass(frozen=True)
class BackendFacts:
    """What a backend runs on, and what its steps read.

    device: the processor's name. driver, capability: a GPU's driver and compute capability, "" elsewhere. library,
    version: what runs the graph. weights: their bytes. row: bytes of one token's keys and values, all layers.
    bandwidth: bytes a second of the device's memory, measured; None where it is not known.
    """

    device: str
    driver: str
    capability: str
    library: str
    version: str
    weights: int
    row: int
    bandwidth: float | None


def name_outputs(
    tokens: IntArray, argmax: IntArray, logits: FloatArray, hidden: FloatArray, new: FloatArray
) -> StepOutputs:
    """Name what a step gives, in the contract's order. new (2 · layers, B, T, W): its keys, then its values."""
    layers = len(new) // 2
    return {
        contract.TOKENS: tokens,
        contract.ARGMAX: argmax,
        contract.LOGITS: logits,
        contract.HIDDEN: hidden,
        **{contract.new_key(i): new[i] for i in range(layers)},
        **{contract.new_value(i): new[layers + i] for i in range(layers)},
    }


class Backend(Protocol):
    """Runs steps on one device. What it returns is valid until its next run.

    One call at a time: `allocate`, `run` and `commit` raise BusyError while another thread's call has the `turn`. The
    results of a run are for the thread that ran it: `commit` and the readers raise BusyError in another one. A backend
    whose library keeps state for each thread runs all its steps in one (WrongThreadError).
    """

    name: str
    precision: str
    model: ModelFacts
    heads: HeadFacts
    prefill_chunk: int  # tokens of a prompt that a step is given at most
    # Lengths that the past is padded to, ascending; empty where a past of any length runs as it is.
    padded_past_lengths: Sequence[int]
    run_seconds: float  # how long the last run took, the device's own work; the rest of a step is the host's
    exclusive_use: ExclusiveUse  # who holds it has the backend to itself: a decoder does for a whole step
    logits_on_host: bool  # whether reading a row of logits copies nothing from a device

    def facts(self) -> BackendFacts:
        """Describe device and library; may take a second, since memory is timed."""

    def allocate(self, batch: int, capacity: int) -> None:
        """Lay out zero-filled KV arenas for `batch` sequences of `capacity` rows each.

        Growing keeps every row written so far, and another batch those of the sequences that both have. Raises
        CapacityError when the memory cannot be had; all is then as it was before.
        """

    def run(self, step: Step) -> None:
        """Run one step over the past held and return when its results can be read.

        The arenas must have room for all its rows behind the past: a backend may write them there before any is kept.
        Raises BackendError where the library fails; the past is then as it was before.
        """

    def read_tokens(self, sequence: int = 0) -> list[int]:
        """Return T ids: the last step's, with the candidates filled in."""

    def read_argmax(self, sequence: int = 0) -> list[int]:
        """Return R ids: the greedy next token at each wanted row."""

    def read_logits(self, row: int, sequence: int = 0) -> FloatArray:
        """Return (V,) float32: the logits at one of the R wanted rows."""

    def read_outputs(self) -> StepOutputs:
        """Return copies of all that the last run gave; for looking at it, not for the loop. Call it before `commit`.

        tokens (B, T) and argmax (B, R) int32; logits (B, R, V), hidden (B, T, S) and each layer's new_key_{i} and
        new_value_{i} (B, T, W), all float32 however the backend keeps them.
        """

    def commit(self, sequence: int, path: Sequence[int], length: int) -> None:
        """Write the rows of the nodes in `path`, which ascends, behind the first `length` rows of the sequence's past.

        The hidden state of the last of them becomes the one that the next draft starts from.
        """
