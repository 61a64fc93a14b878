"""The decoding loop: draft and verify a tree, accept a path, keep its rows, repeat."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from collections.abc import Sequence as Ids

from medusa_profiles.profile import TreeProfile, shown

from medusa_runtime.accept import AcceptRule, greedy
from medusa_runtime.arguments import as_int, as_stop_ids, as_token_ids
from medusa_runtime.backends.base import Backend
from medusa_runtime.drafting.controller import Choice
from medusa_runtime.drafting.draft_tree import DraftTree
from medusa_runtime.drafting.drafter import Draft
from medusa_runtime.errors import ArgumentError, CapacityError, InvalidLogitsError, MedusaError, PromptError
from medusa_runtime.exclusive import ExclusiveUse, strictly_exclusive
from medusa_runtime.kv_cache import KvCache
from medusa_runtime.prefill import prefill
from medusa_runtime.prefix_reuse import PrefixReuse
from medusa_runtime.rows import RowReader, SavedRow, StepRows
from medusa_runtime.sequence import SequenceState
from medusa_runtime.step_cache import StepCache
from medusa_runtime.warm_up import WARM_UP_RUNS, warm_up_steps

PLAIN = TreeProfile.plain()


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
        reuse: Finds rows of earlier sequences for prompts that begin like them; it has no budget and does nothing
            unless it is replaced before the first prompt.
        sequence: The answer in progress or the last one; None before the first.
        steps: Steps since `start`; the prefill does not count.
        profile: The tree that the steps verify.
        rows: Reads the logits that the last accepted tokens were chosen from.
        last_tree: The tree of the last step, the root alone where nothing could be drafted.
        last_path: Its accepted nodes; token i of what `step` returned was chosen at row `last_path[i]`.
        last_accepted: Number of candidates on the path before it was cut at the answer's end.
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
                f"the accept rule is {shown(accept)}; expected a function: pass one of accept.ACCEPT_RULES"
            )
        self.backend, self.accept = backend, accept
        self._steps = StepCache(backend.heads)
        self.profile: TreeProfile = PLAIN if profile is None else profile
        self._steps.get(self.profile)
        self._step_rows = StepRows(backend)
        self.rows: RowReader = self._step_rows
        self.last_tree, self.last_path, self.last_accepted = DraftTree(PLAIN), [0], 0
        self._prompt: tuple[tuple[int, ...], SavedRow] | None = None  # the prompt in the cache and its last row
        self.cache = KvCache(backend)  # last, so that a failed constructor does not occupy the backend
        self.reuse = PrefixReuse(self.cache)
        self.sequence: SequenceState | None = None
        self.steps = 0  # steps since `start`, the prefill not counted

    @property
    def exclusive_use(self) -> ExclusiveUse:
        """The backend's lock: one call at a time."""
        return self.backend.exclusive_use

    @strictly_exclusive
    def set_profile(self, profile: TreeProfile) -> None:
        """Verify another tree from the next step on.

        Raises:
            ProfileError: The tree needs more heads or candidates than the bundle has.
            ArgumentError: `profile` is not a TreeProfile.
            BusyError: Another thread is decoding.
        """
        self._check_owner()
        self._steps.get(profile)
        self.profile = profile

    def abort(self) -> None:
        """Abort the answer in progress, so that any thread may start another one; callable from any thread."""
        sequence = self.sequence
        if sequence is not None:
            sequence.owner = None

    def _check_owner(self) -> None:
        """Raise BusyError while an unfinished answer belongs to another thread that is alive."""
        if self.sequence is not None:
            self.sequence.check_owner(self.backend.name)

    @strictly_exclusive
    def warm_up(self, checkpoint: Callable[[], None] | None = None, choices: Collection[Choice] = ()) -> None:
        """Run a step of every shape that answers can need, so that no request waits while one is prepared.

        These are plain decoding, the current tree and further choices of drafts behind pasts of every length, and
        prompts; on a GPU each becomes a CUDA graph. An answer in progress is discarded. A backend may be bound to the
        thread that calls it. `checkpoint` is called before each step; what it raises ends the preparation. Raises
        BusyError if another thread is decoding.
        """
        self._check_owner()
        self.sequence = self._prompt = None
        self.cache.truncate(0)
        kinds = (False,) if self.backend.logits_on_host else (False, True)  # with summaries: what samples needs them
        drafts = dict.fromkeys((Choice(PLAIN, 0), Choice(self.profile, 0), *choices))
        trees = [self._steps.get(draft.profile, kind, draft.literals) for draft in drafts for kind in kinds]
        for step in warm_up_steps(self.backend, self.cache, trees):
            for _ in range(WARM_UP_RUNS):
                if checkpoint is not None:
                    checkpoint()
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
        model = self.backend.model
        ids = as_token_ids(prompt, model.vocab_size)
        limit = as_int("max_new_tokens", max_new_tokens, 1, PromptError)
        stop = as_stop_ids(model.eos_token_ids if stop_ids is None else stop_ids)
        sequence = SequenceState(tuple(ids.tolist()), limit, stop, model.context)
        self.begin(sequence)
        return list(sequence.answer)

    def begin(
        self, sequence: SequenceState, checkpoint: Callable[[], None] | None = None, *, keep_prompt: bool = False
    ) -> None:
        """Prefill a sequence's prompt and accept the first token of its answer; an earlier answer is discarded.

        Args:
            sequence: A sequence without an answer, whose token ids are in the vocabulary.
            checkpoint: Called before each part of the prompt; what it raises ends the prefill.
            keep_prompt: Whether other answers to the same prompt will follow (`begin_again`).

        Raises: As `start` does.
        """
        if len(sequence.prompt) >= self.cache.context:
            raise CapacityError(
                f"the prompt has {len(sequence.prompt)} tokens, which leaves no room for an answer in the context of "
                f"{self.cache.context} tokens (the bundle's context, or max_length); shorten it or allow a longer "
                "context"
            )
        try:
            self._begin(sequence, checkpoint, keep_prompt)
        except BaseException:
            sequence.owner = None  # the caller does not receive it
            raise

    @strictly_exclusive
    def _begin(self, sequence: SequenceState, checkpoint: Callable[[], None] | None, keep_prompt: bool) -> None:
        self._check_owner()
        self.sequence, self.steps = None, 0  # if the prefill fails there is no answer to continue
        self._prompt = None
        sequence.reused = self.reuse.prepare(sequence)
        prefill(self.backend, self.cache, sequence, checkpoint)
        self._step_rows.begin("of the prompt", len(sequence.prompt) - 1)
        try:
            self._step_rows.check_prompt(sequence.prompt)
        except InvalidLogitsError:
            self.reuse.clear()  # rows that were reused may be the cause
            raise
        if keep_prompt:
            self._prompt = sequence.prompt, self._step_rows.save(0)
        self._accept_first(sequence, self._step_rows, self.backend.read_argmax())

    @strictly_exclusive
    def begin_again(self, sequence: SequenceState) -> None:
        """Accept the first token of another answer to the prompt in the cache, without a prefill.

        Args:
            sequence: A sequence without an answer, of the prompt that was kept.

        Raises:
            MedusaError: Another prompt is in the cache, or its last row was not kept.
        """
        self._check_owner()
        if self._prompt is None or self._prompt[0] != sequence.prompt:
            raise MedusaError("the prompt of this sequence is not in the KV cache; start it with begin")
        self.sequence, self.steps = None, 0
        self.cache.truncate(len(sequence.prompt))
        self.reuse.hold(sequence)
        row = self._prompt[1]
        self._accept_first(sequence, row, [int(row(0).argmax())])

    def _accept_first(self, sequence: SequenceState, rows: RowReader, argmax: list[int]) -> None:
        """Accept the first token of an answer, from the row behind its prompt."""
        self.rows, self.last_tree, self.last_path, self.last_accepted = rows, DraftTree(PLAIN), [0], 0
        _, token = (sequence.rule or greedy)(PLAIN, [sequence.last_token], argmax, rows)
        sequence.extend([token])
        sequence.owner = threading.current_thread()
        self.sequence = sequence

    def step(self, sequence: SequenceState | None = None) -> list[int]:
        """Run one step: draft and verify the tree, and accept a path.

        Args:
            sequence: The answer to continue, as it was passed to `begin`; None is the one in progress. With it,
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
        draft = Draft(self.profile) if sequence.drafter is None else sequence.drafter.next(sequence)
        profile, literals = draft.profile if cache.can_draft() else PLAIN, draft.literals
        if length + profile.size + len(literals) > cache.context:
            profile, literals = PLAIN, ()  # no room left for the tree
        inputs = self._steps.get(profile, sequence.summaries, len(literals))
        tree = inputs.tree
        cache.reserve(length + tree.size)  # an in-place backend writes all of the tree's rows there
        inputs.update(sequence.last_token, length, literals)
        self.backend.run(inputs.step)
        self.rows = rows = self._step_rows
        rows.begin(f"of step {self.steps + 1}")
        tokens = self.backend.read_tokens()
        path, next_token = (sequence.rule or self.accept)(tree, tokens, self.backend.read_argmax(), rows)
        accepted = sequence.clip([tokens[node] for node in path[1:]] + [next_token])
        self.last_accepted = len(path) - 1
        whole, path = path, path[: len(accepted)]
        for row in path:
            rows.check(row)
        cache.commit(path)
        self.last_tree, self.last_path = tree, path
        self.steps += 1
        sequence.answer += accepted
        if sequence.drafter is not None:
            sequence.drafter.observe(tree, whole, 1e3 * self.backend.run_seconds)
        return accepted
