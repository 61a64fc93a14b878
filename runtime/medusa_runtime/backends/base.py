"""The backend protocol: what the decoding loop asks of the library that runs the graph.

A backend owns the KV cache of its sequences and runs one step of the graph at a time. Symbols for shapes, here and in
all backends: B sequences, T nodes per sequence, R rows per sequence whose logits are computed, V vocabulary size,
K = min(64, V) entries of a row's summary, E elements of a hidden state, W = kv_heads · head_dim elements of one token's
key (or value) of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from medusa_runtime import contract
from medusa_runtime.backends.saved_past import PastCopies

if TYPE_CHECKING:
    from medusa_runtime.exclusive import ExclusiveUse
    from medusa_runtime.facts import HeadFacts, ModelFacts

IntArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float32]
PREFILL_CHUNK = 256  # tokens of a prompt that one step processes, in most backends
MAX_PREFILL_CHUNK = 1024  # the same, at most in any backend: in-place graphs have so many rows behind the context
StepOutputs = dict[str, FloatArray | IntArray]  # by the names of `medusa_runtime.contract`, in its order


@dataclass(frozen=True, eq=False)
class Step:
    """The inputs of one step, except for the past, which the backend owns.

    A step can be run again after its arrays were changed in place. Backends rely on it: one may bind the arrays once
    and read them again in every run, for as long as the step lives.

    Args:
        input_ids: (B, T) token ids; -1 - (head · top_k + rank) stands for the candidate of that rank that a head
            proposes (`medusa_profiles.node_ids`). Example: with top_k = 10, -13 is -1 - (1 · 10 + 2), rank 2 of head 1.
            Column 0 is the root.
        position_ids: (B, T) position of each node: the length of the past plus the depth of the node.
        tree_mask: (B, T, T), true where a node (second dimension) attends to a node of this step (third dimension).
        past_length: (B,) rows of the past of each sequence.
        logit_rows: (B, R) nodes whose logits are computed.
        draft: Whether the Medusa heads run, on the hidden state that the last commit kept.
        summaries: Whether all R rows are summarised, where the backend's graphs can (`Backend.read_summary`).
    """

    input_ids: IntArray
    position_ids: IntArray
    tree_mask: BoolArray
    past_length: IntArray
    logit_rows: IntArray
    draft: bool
    summaries: bool = False


class RowSummary(NamedTuple):
    """The most likely next tokens at one row, and two facts about all V logits of the row.

    Args:
        ids: (K,) token ids, descending by logit; tokens of equal logits in any order, and any of those whose logits
            equal the last entry's.
        logits: (K,) their logits.
        logsumexp: Natural logarithm of the sum of exp(logit) over all V tokens.
        finite: True only if all V logits are finite; it may be false where just their sum overflows. Where it is false,
            the other fields are unspecified.
    """

    ids: IntArray
    logits: FloatArray
    logsumexp: float
    finite: bool


def literal_step(ids: IntArray, length: int, logit_rows: IntArray, summaries: bool = False) -> Step:
    """Return the causal step of consecutive tokens of one sequence, without a draft: prefill and plain decoding.

    Args:
        ids: (T,) token ids.
        length: Rows of the past.
        logit_rows: (R,) tokens whose logits are computed.
        summaries: Whether these rows are summarised.
    """
    T = len(ids)
    return Step(
        input_ids=ids[None],
        position_ids=np.arange(length, length + T, dtype=np.int32)[None],
        tree_mask=np.tri(T, dtype=np.bool_)[None],
        past_length=np.array([length], dtype=np.int32),
        logit_rows=logit_rows[None],
        draft=False,
        summaries=summaries,
    )


@dataclass(frozen=True)
class BackendFacts:
    """A description of the hardware and the library that a backend uses, and of the memory that its steps read.

    Args:
        device: Name of the processor.
        driver: Version of the GPU's driver; "" on a CPU.
        capability: Compute capability of the GPU, "9.0" for example; "" on a CPU.
        library: Name of the library that runs the graph.
        version: Its version.
        weight_bytes: Bytes of the weights.
        kv_bytes_per_token: Bytes of the keys and values of one token, all layers.
        bandwidth: Measured bandwidth of the device's memory in bytes per second; None where it is unknown.
        threads: CPU threads that run the steps; 0 on a GPU.
    """

    device: str
    driver: str
    capability: str
    library: str
    version: str
    weight_bytes: int
    kv_bytes_per_token: int
    bandwidth: float | None
    threads: int = 0


def name_outputs(
    tokens: IntArray, argmax: IntArray, logits: FloatArray, hidden: FloatArray, new: FloatArray
) -> StepOutputs:
    """Put the outputs of a step into a dict, by the names of the contract and in its order.

    Args:
        tokens: (B, T).
        argmax: (B, R).
        logits: (B, R, V).
        hidden: (B, T, E).
        new: (2 · layers, B, T, W): the new keys of all layers, then the new values of all layers.
    """
    layers = len(new) // 2
    return {
        contract.TOKENS: tokens,
        contract.ARGMAX: argmax,
        contract.LOGITS: logits,
        contract.HIDDEN: hidden,
        **{contract.new_key(i): new[i] for i in range(layers)},
        **{contract.new_value(i): new[layers + i] for i in range(layers)},
    }


class Backend(PastCopies, Protocol):
    """Runs steps of a graph on one device.

    To add a backend, write a module with a class that implements this protocol and a function
    `load(bundle, model, name, precision, threads, gpu)` that returns it, and list the module in `backends.BACKENDS`. A
    backend on a GPU can derive from `medusa_runtime.backends.device_backend.DeviceBackend`.

    Order of calls: `allocate` first; then for every step `run`, any of the readers, and `commit` once for each sequence
    that keeps nodes. `allocate` may be called again at any time, with a larger capacity or another batch; the results
    of the last run may then be lost. A run without a commit leaves the past as it was: this is how rejected tokens are
    rolled back. The backend does not store the length of a past: every step and commit passes it, and passing a
    smaller one truncates. `save_past` and `restore_past` (`PastCopies`) copy rows at any time after `allocate`.

    Threads: one call at a time. All of these but the readers raise BusyError while another thread's call is at work
    (use `medusa_runtime.exclusive.exclusive`). Results belong to the thread that ran the step: readers and `commit`
    raise BusyError in any other thread. A backend whose library keeps state per thread raises WrongThreadError if `run`
    is called in another thread than the first time.

    Interrupts: a KeyboardInterrupt can occur at any line. After one in `allocate` or `run` the past is what it was
    before and the step can be run again. After one in `commit` the step has to be run again before it is committed.

    Calls in the wrong order are errors of the caller and raise RuntimeError.

    Attributes:
        name: Name of the backend, a key of `backends.BACKENDS`.
        precision: Precision of the graph's weights.
        model: The model; its `context` is the longest past plus step.
        heads: The Medusa heads.
        prefill_chunk: Tokens of a prompt that one step processes at most.
        padded_past_lengths: Lengths to which the past is padded, ascending, so that all of them can be warmed up; empty
            if the backend runs any length as it is.
        literal_counts: How many literals a draft may have, ascending: few numbers where every size is prepared.
        mixes_drafts: Whether a draft may have literals next to candidates of the heads.
        run_seconds: Duration of the last run, in seconds. The rest of a step's time is spent on the host.
        exclusive_use: Guards the calls. A decoder enters it for a whole step, so that no other call comes in between.
        logits_on_host: Whether `read_logits` copies nothing from a device.
    """

    name: str
    precision: str
    model: ModelFacts
    heads: HeadFacts
    prefill_chunk: int
    padded_past_lengths: Sequence[int]
    literal_counts: Sequence[int]
    mixes_drafts: bool
    run_seconds: float
    exclusive_use: ExclusiveUse
    logits_on_host: bool

    def facts(self) -> BackendFacts:
        """Describe device and library. May take a second, since the memory bandwidth is measured."""

    def allocate(self, batch: int, capacity: int) -> None:
        """Make sure that the KV cache has room.

        All rows written so far are kept; with another batch, those of the sequences that both have. New memory is
        filled with zeros.

        Args:
            batch: Number of sequences.
            capacity: Rows (tokens) of each sequence, at least.

        Raises:
            CapacityError: The memory is not available, or the backend does not decode so many sequences at once. The
                backend is then as it was before.
            BusyError: Another thread's call is at work.
        """

    def run(self, step: Step) -> None:
        """Run one step and return when its results can be read.

        The KV cache must have room for T rows behind the past, because a backend may write them there before any is
        accepted.

        Args:
            step: The inputs. B must be the allocated batch.

        Raises:
            BackendError: The library failed. The past is as it was before.
            CapacityError: The memory for such a step is not available, or no engine fits it.
            BundleError: An engine that only this step needs cannot be loaded.
            WrongThreadError: The library requires the thread of the first step.
            BusyError: Another thread's call is at work.
            RuntimeError: Nothing was allocated, the step does not fit the allocated rows, or the graph cannot fill one
                of its nodes: without a draft all nodes must be token ids, with one also candidates of the heads.
        """

    def read_tokens(self, sequence: int = 0) -> list[int]:
        """Return the T token ids of the last step, with the heads' candidates filled in.

        Args:
            sequence: Index of the sequence.

        Raises:
            BusyError: Another thread ran the step.
            RuntimeError: No step was run, or the last run did not succeed.
        """

    def read_argmax(self, sequence: int = 0) -> list[int]:
        """Return the R greedy next token ids, one per row of `logit_rows`. Raises as `read_tokens` does."""

    def read_logits(self, row: int, sequence: int = 0) -> FloatArray:
        """Return the logits of one row: (V,) float32, valid until the next run. Raises as `read_tokens` does.

        Args:
            row: Index into `logit_rows`, from 0 to R - 1.
            sequence: Index of the sequence.
        """

    def read_summary(self, row: int, sequence: int = 0) -> RowSummary | None:
        """Return the summary of one row, which copies nothing from a device; its arrays are valid until the next run.

        None where the last run has none: the step did not ask for summaries, or the backend's graphs have none, as on a
        CPU, where `read_logits` copies nothing either. Raises as `read_tokens` does.

        Args:
            row: Index into `logit_rows`, from 0 to R - 1.
            sequence: Index of the sequence.
        """

    def read_finite(self, row: int, sequence: int = 0) -> bool | None:
        """Return whether all logits of one row are finite, which copies nothing from a device.

        None where the backend computes no flags, as on a CPU. False may also mean that just the sum of the logits
        overflows. Arguments and errors are those of `read_logits`.
        """

    def read_outputs(self) -> StepOutputs:
        """Return copies of all outputs of the last run, for comparisons; the decoding loop does not need it.

        Call it before `commit`, which may move rows. Raises as `read_tokens` does.

        Returns:
            tokens (B, T) and argmax (B, R) int32; logits (B, R, V), hidden (B, T, E) and for each layer i `new_key_{i}`
            and `new_value_{i}` (B, T, W), all float32, whatever the precision that the backend computes in. Summaries
            are not among them.
        """

    def commit(self, sequence: int, path: Sequence[int], length: int) -> None:
        """Keep the accepted nodes of the last step.

        Their keys and values become the rows behind the first `length` rows of the sequence's past, and the hidden
        state of the last one becomes the state that the next draft starts from. Example: with length = 5 and
        path = [0, 2, 3], nodes 0, 2 and 3 become rows 5, 6 and 7, and the past then has 8 rows.

        Args:
            sequence: Index of the sequence.
            path: Accepted nodes, ascending, at least one.
            length: Rows of the sequence's past that the step was run behind.

        Raises:
            BusyError: Another thread ran the step, or its call is at work.
            RuntimeError: No step was run, the rows do not fit, or this step was committed before for the sequence,
                which may have been interrupted.
        """
