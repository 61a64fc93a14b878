"""The loop: draft and verify a tree, keep the longest path the decoder agrees with, roll the rest back."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Ids
from itertools import product

import numpy as np
from medusa_profiles.profile import TreeProfile
from numpy.typing import NDArray

from medusa_runtime.accept import AcceptRule, greedy
from medusa_runtime.arguments import as_int, as_stop_ids, as_token_ids
from medusa_runtime.backends.base import Backend, FloatArray, IntArray, Step, literal_step
from medusa_runtime.errors import (
    ArgumentError,
    BusyError,
    CapacityError,
    InvalidLogitsError,
    MedusaError,
    PromptError,
)
from medusa_runtime.exclusive import ExclusiveUse, strictly_exclusive
from medusa_runtime.kv_cache import KvCache
from medusa_runtime.sequence import SequenceState
from medusa_runtime.tree_step import TreeStep

WARM_UP_RUNS = 2  # runs of one shape: a GPU's first is a plain one, the second is captured
MAX_CACHED_TREES = 8  # whose arrays, and what a backend has bound to them, are held for when they come back


class Decoder:
    """Token ids in, token ids out, one sequence at a time.

    `start` takes a prompt, `step` gives the next tokens; between the two, `cache.length() == sequence.length - 1`.

    Threads: one call at a time, and an unfinished answer belongs to the thread that started it. Another thread's call
    raises BusyError and changes nothing, until the answer is finished, given up (`stop`) or its thread has ended; in
    the same thread the next `start` simply forgets it.

    Interrupts: if a step raises, KeyboardInterrupt included, then nothing of it is kept and the next `step` takes it
    again. If `start` or `warm_up` raises once it has begun to work, there is nothing to step on.
    """

    def __init__(self, backend: Backend, profile: TreeProfile | None = None, accept: AcceptRule = greedy) -> None:
        """Decode with `backend`; without a profile (or with the root alone) this is plain decoding, no heads run.

        Raises ProfileError where the heads do not reach the profile, MedusaError while another decoder has the backend,
        ArgumentError for a profile or rule of another type.
        """
        if not callable(accept):
            raise ArgumentError(
                f"the accept rule is {accept!r:.80}; expected a function: pass one of accept.ACCEPT_RULES"
            )
        self.backend, self.accept = backend, accept
        self._inputs: dict[TreeProfile, TreeStep] = {}  # of the last trees used: a backend binds each once
        self._plain = self._tree = self._inputs_of(TreeProfile.plain())
        if profile is not None:
            self._tree = self._inputs_of(profile)
        self.cache = KvCache(backend)  # last: a decoder that cannot be made takes no backend
        self.sequence: SequenceState | None = None
        self.steps = 0  # steps since `start`, the prefill not counted

    @property
    def exclusive_use(self) -> ExclusiveUse:
        """The backend's: one call at a time."""
        return self.backend.exclusive_use

    @property
    def profile(self) -> TreeProfile:
        """The tree in use."""
        return self._tree.profile

    @strictly_exclusive
    def set_profile(self, profile: TreeProfile) -> None:
        """Decode with another tree from the next step on.

        Raises ProfileError where the heads do not reach it, ArgumentError for what is no TreeProfile, BusyError.
        """
        self._check_owner()
        self._tree = self._inputs_of(profile)

    def _inputs_of(self, profile: TreeProfile) -> TreeStep:
        if not isinstance(profile, TreeProfile):
            raise ArgumentError(
                f"the profile is {profile!r:.80}, of type {type(profile).__name__}; expected a TreeProfile: a bundle "
                "gives one by its name, Bundle.profile(name)"
            )
        heads = self.backend.heads
        profile.check_fits(heads.count, heads.top_k)
        if profile not in self._inputs:
            self._inputs[profile] = TreeStep(profile, heads.top_k)
        while len(self._inputs) > MAX_CACHED_TREES:
            del self._inputs[next(iter(self._inputs))]  # the oldest
        return self._inputs[profile]

    def abort(self) -> None:
        """Give up the answer in progress, so that any thread may start another. Can be called from any thread."""
        sequence = self.sequence
        if sequence is not None:
            sequence.owner = None

    def _check_owner(self) -> None:
        """Raise BusyError while an unfinished answer belongs to another thread that is alive."""
        sequence = self.sequence
        if sequence is None or sequence.finish_reason is not None:
            return
        owner = sequence.owner
        if owner is not None and owner is not threading.current_thread() and owner.is_alive():
            raise BusyError(
                f"{self.backend.name} is in the middle of an answer for thread {owner.name!r}, expected to be asked by "
                "that thread alone; wait for the answer's end, close it (Generation.close, Decoder.stop), or load a "
                "second engine"
            )

    @strictly_exclusive
    def warm_up(self) -> None:
        """Run a step of every shape that answers may take, so that none of them waits while one is made ready.

        That is plain decoding and the tree in use behind pasts of all lengths, and prompts: three seconds on an H100,
        where each becomes a CUDA graph; on a CPU two steps of each tree. What was being decoded is forgotten. Call it
        in the thread that is going to decode: a backend may be bound to the first thread that runs a step.
        """
        self._check_owner()
        self.sequence = None
        self.cache.truncate(0)
        for step in self._every_shape():
            for _ in range(WARM_UP_RUNS):
                self.backend.run(step)

    def _every_shape(self) -> Iterator[Step]:
        context, pasts = self.cache.context, self.backend.padded_past_lengths
        for past, tree in product(pasts or (0,), dict.fromkeys((self._plain, self._tree))):
            length = min(past, context - tree.profile.size)
            if length >= 0:
                self.cache.reserve(length + tree.profile.size)
                tree.update(0, length)
                yield tree.step
        sizes = [1 << doublings for doublings in range(self.backend.prefill_chunk.bit_length())]
        for past, size in product(pasts, sizes):
            if size <= context:
                yield literal_step(np.zeros(size, np.int32), min(past, context - size), np.array([size - 1], np.int32))

    def start(self, prompt: Ids[int], max_new_tokens: int = 128, stop_ids: Collection[int] | None = None) -> list[int]:
        """Prefill a prompt and return the first token of its answer, forgetting whatever was decoded before.

        `stop_ids` None means the model's own end tokens. Raises PromptError for an empty prompt, an id outside the
        vocabulary or an argument of another type, CapacityError for one that leaves no room in the model's context,
        InvalidLogitsError where the backend gives no valid logits, BackendError, BusyError.
        """
        return list(self.start_sequence(prompt, max_new_tokens, stop_ids).answer)

    def start_sequence(
        self, prompt: Ids[int], max_new_tokens: int = 128, stop_ids: Collection[int] | None = None
    ) -> SequenceState:
        """Do the same and return the answer in progress, of one token."""
        model = self.backend.model
        ids = as_token_ids(prompt, model.vocab_size)
        if ids.size >= model.context:
            raise CapacityError(
                f"the prompt has {ids.size} tokens, the model's context is {model.context}: no room for an answer; "
                "shorten it"
            )
        limit = as_int("max_new_tokens", max_new_tokens, 1, PromptError)
        stop = as_stop_ids(model.eos_token_ids if stop_ids is None else stop_ids)
        sequence = SequenceState(tuple(ids.tolist()), limit, stop, model.context)
        try:
            self._begin(ids, sequence)
        except BaseException:
            sequence.owner = None  # nobody gets to know of it
            raise
        return sequence

    @strictly_exclusive
    def _begin(self, ids: NDArray[np.int64], sequence: SequenceState) -> None:
        self._check_owner()
        self.sequence, self.steps = None, 0  # if the prefill fails there is nothing to step on
        self.cache.truncate(0)
        self.cache.reserve(ids.size)
        chunk = self.backend.prefill_chunk
        for first in range(0, ids.size, chunk):
            self._prefill(ids[first : first + chunk].astype(np.int32))
        self._check_prefill(ids)
        sequence.extend(self.backend.read_argmax())
        sequence.owner = threading.current_thread()
        self.sequence = sequence

    def step(self, sequence: SequenceState | None = None) -> list[int]:
        """Run one step and return the tokens it adds: one at least, the whole kept path and one more at most.

        sequence: the answer that the caller means. With it, another thread may go on with an answer than the one that
        started it, which then belongs to that thread, and MedusaError is raised if another prompt was started since.
        Raises InvalidLogitsError for logits that are not finite, CapacityError, BackendError, BusyError; nothing of
        the step is then kept.
        """
        before = None
        try:
            self.exclusive_use.enter()
            current = self._to_step(sequence)
            before = len(current.answer), self.steps
            taken = self._advance(current)
            self.exclusive_use.leave()
            return taken  # noqa: TRY300 -- an interrupt here counts too
        except BaseException:
            if before is not None:  # the caller gets no tokens, so there are to be none
                del current.answer[before[0] :]
                self.steps = before[1]
            self.exclusive_use.leave()
            raise

    def _to_step(self, wanted: SequenceState | None) -> SequenceState:
        """Return the answer in progress, which must be the one that is wanted."""
        sequence = self.sequence
        if wanted is not None and wanted is not sequence:
            raise MedusaError(
                "another prompt was started on this engine before this answer was read to its end; read each answer to "
                "its end before the next one, or load a second engine"
            )
        if sequence is None or sequence.finish_reason is not None:
            raise MedusaError("nothing to decode: start a prompt first, and take no step after an answer is finished")
        if wanted is None:
            self._check_owner()
        sequence.owner = threading.current_thread()
        return sequence

    def _advance(self, sequence: SequenceState) -> list[int]:
        cache, length = self.cache, sequence.length - 1
        if cache.length() > length:  # a step was interrupted after its rows were kept: they are forgotten
            cache.truncate(length)
        if cache.length() < length:
            raise MedusaError(
                f"the KV cache holds {cache.length()} tokens, expected the {length} before the last one; start the "
                "prompt again"
            )
        tree = self._tree
        if not cache.can_draft() or length + tree.profile.size > cache.context:
            tree = self._plain  # no hidden state to draft from, or no rows left for the tree
        cache.reserve(length + tree.profile.size)  # a backend may write all of them where they would be kept
        tree.update(sequence.last_token, length)
        self.backend.run(tree.step)
        tokens = self.backend.read_tokens()
        path, following = self.accept(tree.profile, tokens, self.backend.read_argmax(), self._read_logits)
        taken = sequence.clip([tokens[node] for node in path[1:]] + [following])
        path = path[: len(taken)]
        if self.backend.logits_on_host:
            for row in path:
                self._read_logits(row)
        cache.commit(path)
        self.steps += 1
        sequence.answer += taken
        return taken

    def _read_logits(self, row: int, /) -> FloatArray:
        """Return (V,): the logits at node `row`, all of them finite. Raises InvalidLogitsError."""
        logits = self.backend.read_logits(row)
        least, most = logits.min(), logits.max()
        if not (-np.inf < least and most < np.inf):
            raise self._invalid(least, most, f"at row {row} of step {self.steps + 1}")
        return logits

    def _check_prefill(self, ids: NDArray[np.int64]) -> None:
        """Refuse logits that are not valid: what a graph in 16 bits gives when its numbers grow too large.

        Of one token alone they may well be all the same: a padding token's embedding is 0, and so is all that follows.
        """
        logits = self.backend.read_logits(0)
        least, most = logits.min(), logits.max()
        if not (-np.inf < least and most < np.inf) or (least == most and ids.min() < ids.max()):
            raise self._invalid(least, most, f"at row {ids.size - 1} of the prompt")

    def _invalid(self, least: float, most: float, where: str) -> InvalidLogitsError:
        backend = self.backend
        return InvalidLogitsError(
            f"{backend.name} gave logits from {least} to {most} {where} in {backend.precision}: it does not compute "
            "the model; look where that begins with medusa-export compare, take another precision"
        )

    def _prefill(self, ids: IntArray) -> None:
        """Run one chunk of literal tokens under a causal mask and keep all its rows."""
        last = np.array([len(ids) - 1], dtype=np.int32)
        self.backend.run(literal_step(ids, self.cache.length(), last))
        self.cache.commit(range(len(ids)))
