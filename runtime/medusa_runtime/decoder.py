"""The decoding loop: draft and verify a tree, accept a path, keep its rows, repeat."""

from __future__ import annotations

import threading
from collections.abc import Collection
from collections.abc import Sequence as Ids

import numpy as np
from medusa_profiles.profile import TreeProfile
from numpy.typing import NDArray

from medusa_runtime.accept import AcceptRule, greedy
from medusa_runtime.arguments import as_int, as_stop_ids, as_token_ids
from medusa_runtime.backends.base import Backend, FloatArray, IntArray, literal_step
from medusa_runtime.errors import (
    ArgumentError,
    BusyError,
    CapacityError,
    MedusaError,
    PromptError,
)
from medusa_runtime.exclusive import ExclusiveUse, strictly_exclusive
from medusa_runtime.kv_cache import KvCache
from medusa_runtime.logits_check import check_prompt_logits, read_finite_logits
from medusa_runtime.sequence import SequenceState
from medusa_runtime.tree_step import TreeStep
from medusa_runtime.warm_up import WARM_UP_RUNS, warm_up_steps

MAX_CACHED_TREES = 8  # whose step inputs, and the backend's bindings of them, are kept for reuse


class Decoder:
    """Decodes one sequence at a time: token ids in, token ids out.

    `start` prefills a prompt and returns the first token; each `step` returns one or more further tokens. Between
    calls, `cache.length() == sequence.length - 1`.

    Example::

        decoder = Decoder(load_backend(bundle), bundle.profile("tree-8"))
        tokens = decoder.start([5, 17, 42], max_new_tokens=16)
        while decoder.sequence.finish_reason is None:
            tokens += decoder.step()

    Threads: one call at a time, and an unfinished answer belongs to the thread that started it. A call from another
    thread raises BusyError and changes nothing until the answer is finished or aborted (`abort`), or its thread has
    ended. In the same thread the next `start` discards an unfinished answer.

    Interrupts: if a step raises, KeyboardInterrupt included, nothing of it is kept and the next `step` repeats it. If
    `start` or `warm_up` raises after it began to work, there is no answer to continue.

    Attributes:
        backend: Runs the steps.
        accept: The acceptance rule, one of `medusa_runtime.accept.ACCEPT_RULES` or a function like them.
        cache: Lengths and capacity of the KV cache.
        sequence: The answer in progress or the last one; None before the first.
        steps: Steps since `start`; the prefill does not count.
    """

    def __init__(self, backend: Backend, profile: TreeProfile | None = None, accept: AcceptRule = greedy) -> None:
        """Create a decoder and allocate the backend's KV cache.

        Args:
            backend: A loaded backend, which no other decoder is using.
            profile: The tree to verify in each step; None is plain decoding, for which the heads do not run.
            accept: The acceptance rule.

        Raises:
            ProfileError: The tree needs more heads or candidates than the bundle has.
            MedusaError: Another decoder is using the backend.
            ArgumentError: The profile or the rule has a wrong type.
        """
        if not callable(accept):
            raise ArgumentError(
                f"the accept rule is {accept!r:.80}; expected a function: pass one of accept.ACCEPT_RULES"
            )
        self.backend, self.accept = backend, accept
        self._inputs: dict[TreeProfile, TreeStep] = {}  # of the trees used last: a backend binds each once
        self._plain = self._tree = self._inputs_of(TreeProfile.plain())
        if profile is not None:
            self._tree = self._inputs_of(profile)
        self.cache = KvCache(backend)  # last, so that a failed constructor does not occupy the backend
        self.sequence: SequenceState | None = None
        self.steps = 0  # steps since `start`, the prefill not counted

    @property
    def exclusive_use(self) -> ExclusiveUse:
        """The backend's lock: one call at a time."""
        return self.backend.exclusive_use

    @property
    def profile(self) -> TreeProfile:
        """The tree that the steps verify."""
        return self._tree.profile

    @strictly_exclusive
    def set_profile(self, profile: TreeProfile) -> None:
        """Verify another tree from the next step on.

        Raises:
            ProfileError: The tree needs more heads or candidates than the bundle has.
            ArgumentError: `profile` is not a TreeProfile.
            BusyError: Another thread is decoding.
        """
        self._check_owner()
        self._tree = self._inputs_of(profile)

    def _inputs_of(self, profile: TreeProfile) -> TreeStep:
        if not isinstance(profile, TreeProfile):
            raise ArgumentError(
                f"the profile is {profile!r:.80}, of type {type(profile).__name__}; expected a TreeProfile: pass "
                "Bundle.profile(name), or None for plain decoding"
            )
        heads = self.backend.heads
        profile.check_fits(heads.count, heads.top_k)
        if profile not in self._inputs:
            self._inputs[profile] = TreeStep(profile, heads.top_k)
        while len(self._inputs) > MAX_CACHED_TREES:
            del self._inputs[next(iter(self._inputs))]  # the oldest
        return self._inputs[profile]

    def abort(self) -> None:
        """Abort the answer in progress, so that any thread may start another one; callable from any thread."""
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
                f"{self.backend.name} is in the middle of an answer for thread {owner.name!r}, expected calls from "
                "that thread only; wait for the end of the answer, end it (Generation.close, Decoder.abort), or load a "
                "second engine"
            )

    @strictly_exclusive
    def warm_up(self) -> None:
        """Run a step of every shape that answers can need, so that no request waits while one is prepared.

        These are plain decoding and the current tree behind pasts of every length, and prompts. On an H100, where each
        shape becomes a CUDA graph, it takes about three seconds; on a CPU, two steps of each tree. An answer in
        progress is discarded. Call it in the thread that will decode: a backend may be bound to the first thread that
        runs a step.

        Raises:
            BusyError: Another thread is decoding.
        """
        self._check_owner()
        self.sequence = None
        self.cache.truncate(0)
        for step in warm_up_steps(self.backend, self.cache, [self._plain, self._tree]):
            for _ in range(WARM_UP_RUNS):
                self.backend.run(step)

    def start(self, prompt: Ids[int], max_new_tokens: int = 128, stop_ids: Collection[int] | None = None) -> list[int]:
        """Prefill a prompt and return the first token of its answer; an earlier answer is discarded.

        Args:
            prompt: Token ids.
            max_new_tokens: Maximum number of tokens of the answer.
            stop_ids: Token ids that end the answer; None means the model's own end tokens, () none.

        Returns:
            A list with the first token id.

        Raises:
            PromptError: The prompt is empty, holds an id outside the vocabulary, or an argument has a wrong type.
            CapacityError: The prompt fills the model's context.
            InvalidLogitsError: The backend computed invalid logits.
            BackendError: The backend's library failed.
            BusyError: Another thread is decoding.
        """
        return list(self.start_sequence(prompt, max_new_tokens, stop_ids).answer)

    def start_sequence(
        self, prompt: Ids[int], max_new_tokens: int = 128, stop_ids: Collection[int] | None = None
    ) -> SequenceState:
        """Do what `start` does, with the same arguments and errors, and return the state of the answer."""
        model = self.backend.model
        ids = as_token_ids(prompt, model.vocab_size)
        if ids.size >= model.context:
            raise CapacityError(
                f"the prompt has {ids.size} tokens, which leaves no room for an answer in the context of "
                f"{model.context} tokens (the bundle's context, or max_length); shorten it or allow a longer context"
            )
        limit = as_int("max_new_tokens", max_new_tokens, 1, PromptError)
        stop = as_stop_ids(model.eos_token_ids if stop_ids is None else stop_ids)
        sequence = SequenceState(tuple(ids.tolist()), limit, stop, model.context)
        try:
            self._begin(ids, sequence)
        except BaseException:
            sequence.owner = None  # the caller does not receive it
            raise
        return sequence

    @strictly_exclusive
    def _begin(self, ids: NDArray[np.int64], sequence: SequenceState) -> None:
        self._check_owner()
        self.sequence, self.steps = None, 0  # if the prefill fails there is no answer to continue
        self.cache.truncate(0)
        self.cache.reserve(ids.size)
        chunk = self.backend.prefill_chunk
        for first in range(0, ids.size, chunk):
            self._prefill(ids[first : first + chunk].astype(np.int32))
        check_prompt_logits(self.backend, ids)
        sequence.extend(self.backend.read_argmax())
        sequence.owner = threading.current_thread()
        self.sequence = sequence

    def step(self, sequence: SequenceState | None = None) -> list[int]:
        """Run one step: draft and verify the tree, and accept a path.

        Args:
            sequence: The answer to continue, as `start_sequence` returned it; None is the one in progress. With it,
                another thread than the one that started the answer may continue it and becomes its owner.

        Returns:
            The new token ids: at least one, at most the tree's depth + 1.

        Raises:
            MedusaError: There is no unfinished answer, or another prompt was started since `sequence`.
            InvalidLogitsError: Logits are not finite; nothing of the step is kept.
            CapacityError: Memory does not suffice.
            BackendError: The backend's library failed.
            BusyError: Another thread is decoding.
        """
        before = None
        try:
            self.exclusive_use.enter()
            current = self._to_step(sequence)
            before = len(current.answer), self.steps
            accepted = self._advance(current)
            self.exclusive_use.leave()
            return accepted  # noqa: TRY300 -- an interrupt here counts too
        except BaseException:
            if before is not None:  # the caller receives no tokens, so none may be kept
                del current.answer[before[0] :]
                self.steps = before[1]
            self.exclusive_use.leave()
            raise

    def _to_step(self, wanted: SequenceState | None) -> SequenceState:
        """Return the answer in progress, which must be `wanted` unless that is None; make this thread its owner."""
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
        if cache.length() > length:  # a step was interrupted after its rows were kept
            cache.truncate(length)
        if cache.length() < length:
            raise MedusaError(
                f"the KV cache holds {cache.length()} tokens, expected the {length} before the last one; start the "
                "prompt again"
            )
        tree = self._tree
        if not cache.can_draft() or length + tree.profile.size > cache.context:
            tree = self._plain  # no hidden state to draft from, or no room left for the tree
        cache.reserve(length + tree.profile.size)  # an in-place backend writes all of the tree's rows there
        tree.update(sequence.last_token, length)
        self.backend.run(tree.step)
        tokens = self.backend.read_tokens()
        path, next_token = self.accept(tree.profile, tokens, self.backend.read_argmax(), self._read_logits)
        accepted = sequence.clip([tokens[node] for node in path[1:]] + [next_token])
        path = path[: len(accepted)]
        if self.backend.logits_on_host:
            for row in path:
                self._read_logits(row)
        cache.commit(path)
        self.steps += 1
        sequence.answer += accepted
        return accepted

    def _read_logits(self, row: int, /) -> FloatArray:
        return read_finite_logits(self.backend, row, f"at row {row} of step {self.steps + 1}")

    def _prefill(self, ids: IntArray) -> None:
        """Run one chunk of the prompt under a causal mask and keep all its rows."""
        last = np.array([len(ids) - 1], dtype=np.int32)
        self.backend.run(literal_step(ids, self.cache.length(), last))
        self.cache.commit(range(len(ids)))
