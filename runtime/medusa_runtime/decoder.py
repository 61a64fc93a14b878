"""The loop: draft and verify a tree, keep the longest path the decoder agrees with, roll the rest back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from collections.abc import Sequence as Ids
from itertools import product

import numpy as np
from medusa_profiles.profile import TreeProfile
from numpy.typing import NDArray

from medusa_runtime.accept import AcceptRule, greedy
from medusa_runtime.backends.base import Backend, IntArray, Step, literal_step
from medusa_runtime.errors import CapacityError, MedusaError, PromptError
from medusa_runtime.kv_cache import KvCache
from medusa_runtime.sequence import Sequence

UNTIL_READY = 2  # runs of one shape: a GPU's first is a plain one, the second is captured
KEPT_TREES = 8  # whose arrays, and what a backend has bound to them, are held for when they come back


class Decoder:
    """Token ids in, token ids out, one sequence at a time.

    `start` takes a prompt, `step` gives the next tokens; between the two, `cache.length() == sequence.length - 1`.
    """

    def __init__(self, backend: Backend, profile: TreeProfile | None = None, accept: AcceptRule = greedy) -> None:
        """Decode with `backend`; without a profile (or with the root alone) this is plain decoding, no heads run.

        Raises ProfileError where the heads do not reach the profile, MedusaError while another decoder has the backend.
        """
        self.backend, self.accept = backend, accept
        self._inputs: dict[TreeProfile, _TreeInputs] = {}  # of the last trees used: a backend binds each once
        plain = TreeProfile.plain()
        self.use(plain)
        self._plain = self._tree
        self.use(profile or plain)
        self.cache = KvCache(backend)  # last: a decoder that cannot be made takes no backend
        self.sequence: Sequence | None = None
        self.steps = 0  # steps since `start`, the prefill not counted

    def use(self, profile: TreeProfile) -> None:
        """Decode with another tree from the next step on."""
        profile.require(self.backend.heads.count, self.backend.heads.top_k)
        self.profile = profile
        if profile not in self._inputs:
            self._inputs[profile] = _TreeInputs(profile, self.backend.heads.top_k)
            if len(self._inputs) > KEPT_TREES:
                del self._inputs[next(iter(self._inputs))]  # the oldest
        self._tree = self._inputs[profile]

    def warm_up(self) -> None:
        """Run a step of every shape that answers may take, so that none of them waits while one is made ready.

        That is plain decoding and the tree in use behind pasts of all lengths, and prompts: three seconds on an H100,
        where each becomes a CUDA graph; on a CPU two steps of each tree. What was being decoded is forgotten.
        """
        self.sequence = None
        self.cache.truncate(0)
        for step in self._every_shape():
            for _ in range(UNTIL_READY):
                self.backend.run(step)

    def _every_shape(self) -> Iterator[Step]:
        context, pasts = self.cache.context, self.backend.pasts
        for past, tree in product(pasts or (0,), dict.fromkeys((self._plain, self._tree))):
            length = min(past, context - tree.profile.size)
            if length >= 0:
                self.cache.reserve(length + tree.profile.size)
                tree.place(0, length)
                yield tree.step
        sizes = [1 << doublings for doublings in range(self.backend.prefill_chunk.bit_length())]
        for past, size in product(pasts, sizes):
            if size <= context:
                yield literal_step(np.zeros(size, np.int32), min(past, context - size), np.array([size - 1], np.int32))

    def start(self, prompt: Ids[int], max_new_tokens: int = 128, stop_ids: Collection[int] | None = None) -> list[int]:
        """Prefill a prompt and return the first token of its answer, forgetting whatever was decoded before.

        `stop_ids` None means the model's own end tokens. Raises PromptError for an empty prompt or an id outside the
        vocabulary, CapacityError for one that leaves no room in the model's context, MedusaError where the backend
        gives no logits worth the name.
        """
        model = self.backend.model
        ids = np.asarray(prompt, dtype=np.int64)
        if not ids.size:
            raise PromptError("the prompt is empty: expected at least one token")
        if ids.ndim != 1:
            raise PromptError(f"the prompt has the shape {ids.shape}; expected one flat list of token ids")
        if ids.min() < 0 or ids.max() >= model.vocab_size:
            raise PromptError(
                f"the prompt has token ids outside 0 … {model.vocab_size - 1}; was another tokenizer used?"
            )
        if ids.size >= model.context:
            raise CapacityError(
                f"the prompt has {ids.size} tokens, the model's context is {model.context}: no room for an answer; "
                "shorten it"
            )
        if max_new_tokens < 1:
            raise PromptError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        stop = frozenset(model.eos_token_ids if stop_ids is None else stop_ids)
        self.sequence, self.steps = None, 0  # if the prefill fails there is nothing to step on
        self.cache.truncate(0)
        self.cache.reserve(ids.size)
        chunk = self.backend.prefill_chunk
        for first in range(0, ids.size, chunk):
            self._prefill(ids[first : first + chunk].astype(np.int32))
        self._check_logits(ids)
        self.sequence = Sequence(tuple(ids.tolist()), max_new_tokens, stop, model.context)
        return self.sequence.extend(self.backend.read_argmax())

    def step(self) -> list[int]:
        """Run one step and return the tokens it adds: one at least, the whole kept path and one more at most."""
        sequence = self.sequence
        if sequence is None or sequence.finish is not None:
            raise MedusaError("nothing to decode: start a prompt first, and take no step after an answer is finished")
        length = self.cache.length()
        tree = self._tree
        if not self.cache.can_draft() or length + tree.profile.size > self.cache.context:
            tree = self._plain  # no hidden state to draft from, or no rows left for the tree
        self.cache.reserve(length + tree.profile.size)  # a backend may write all of them where they would be kept
        tree.place(sequence.last, length)
        self.backend.run(tree.step)
        tokens = self.backend.read_tokens()
        path, following = self.accept(tree.profile, tokens, self.backend.read_argmax(), self.backend.read_logits)
        taken = sequence.extend([tokens[node] for node in path[1:]] + [following])
        self.cache.commit(path[: len(taken)])
        self.steps += 1
        return taken

    def _check_logits(self, ids: NDArray[np.int64]) -> None:
        """Refuse logits that say nothing: what a graph in 16 bits gives when its numbers grow too large.

        Of one token alone they may well be all the same: a padding token's embedding is 0, and so is all that follows.
        """
        logits, backend = self.backend.read_logits(0), self.backend
        least, most = logits.min(), logits.max()
        if not most < np.inf or (least == most and ids.min() < ids.max()):  # not less: no number either
            raise MedusaError(
                f"{backend.name} gave logits from {least} to {most} in {backend.precision}: it does not compute the "
                "model; look where that begins with medusa-export compare, take another precision"
            )

    def _prefill(self, ids: IntArray) -> None:
        """Run one chunk of literal tokens under a causal mask and keep all its rows."""
        last = np.array([len(ids) - 1], dtype=np.int32)
        self.backend.run(literal_step(ids, self.cache.length(), last))
        self.cache.commit(range(len(ids)))


class _TreeInputs:
    """One tree's step, made once; only root, positions and length change from run to run.

    They are written through memoryviews: each run streams the weights through the caches, so what comes after pays
    for every line of code it touches, and numpy's way to one number is long (10 to 50 us a call there, measured).
    """

    def __init__(self, profile: TreeProfile, top_k: int) -> None:
        T = profile.size
        self.profile = profile
        self.step = Step(
            input_ids=profile.candidate_ids(top_k)[None],
            position_ids=np.zeros((1, T), dtype=np.int32),
            tree_mask=np.ascontiguousarray(profile.mask[None]),
            past_length=np.zeros(1, dtype=np.int32),
            logit_rows=np.arange(T, dtype=np.int32)[None],
            draft=T > 1,
        )
        self._depths: list[int] = profile.depths.tolist()
        self._ids, self._positions = self.step.input_ids[0].data, self.step.position_ids[0].data
        self._past_length = self.step.past_length.data

    def place(self, root: int, length: int) -> None:
        """Put the tree behind a past of `length` rows, `root` at its root."""
        self._ids[0] = root
        positions = self._positions
        for node, depth in enumerate(self._depths):
            positions[node] = length + depth
        self._past_length[0] = length
