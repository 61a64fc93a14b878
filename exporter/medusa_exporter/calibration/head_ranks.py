"""Records how the heads rank the tokens of the decoder's own answers, while it decodes them one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from medusa_profiles.profile import TreeProfile
from medusa_runtime.accept import Acceptance as Accepted
from medusa_runtime.accept import TokenTree
from medusa_runtime.calibration import Acceptance, AnswerHits, GraphCalibration, Hits
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import PromptError
from medusa_runtime.facts import HeadFacts
from medusa_runtime.prompt_encoder import PromptEncoder
from medusa_runtime.rows import RowReader

from medusa_exporter.bench.conversations import Skipped, converse
from medusa_exporter.bench.timing import Measurement, Question, generate_timed
from medusa_exporter.prompts import Turns


def largest_worth_recording(calibration: GraphCalibration, heads: HeadFacts) -> int:
    """Return the number of nodes up to which trees are likely to pay: a step takes half of what would never pay.

    Recording takes a step of about as many nodes for every token, so candidates of larger trees would cost a lot.
    """
    most = (heads.count + 1) / 2 * calibration.steps[0].ms
    behind = {step.nodes: step.ms for step in calibration.steps if step.past == calibration.steps[0].past}
    return max(nodes for nodes, ms in behind.items() if nodes <= 2 or ms <= most)


def recorded_ranks(heads: HeadFacts, nodes: int) -> tuple[int, ...]:
    """Return how many candidates of each head to record for trees of up to `nodes` nodes.

    Good trees use fewer of the later heads: with 16 nodes, 8, 4, 3 and 2 of four heads are recorded.
    """
    return tuple(min(heads.top_k, math.ceil(nodes / (2 * (head + 1)))) for head in range(heads.count))


def recording_tree(ranks: Sequence[int]) -> TreeProfile:
    """Return a tree that has every recorded candidate once, (0, …, 0, rank) at its head's depth."""
    return TreeProfile(
        "recording", tuple((0,) * head + (rank,) for head, count in enumerate(ranks) for rank in range(count))
    )


def ranks_in_answer(drafts: Sequence[Sequence[Sequence[int]]], answer: Sequence[int]) -> Hits:
    """Return the rank of each token of an answer among the heads' candidates: (S, K), -1 where it is not among them.

    Example: the answer [5, 6, 7] is decoded in two steps. If one head proposes [9, 6] in the first and [8, 7] in the
    second, the ranks are [[1], [1]]: token 6 follows the first step's root, 5, and token 7 that of the second one.

    Args:
        drafts: The candidates of each head in each of S steps; empty for a step without a draft.
        answer: The S + 1 tokens of the answer.
    """
    heads = max((len(draft) for draft in drafts), default=0)
    hits = np.full((len(drafts), heads), -1, np.int16)
    for place, draft in enumerate(drafts):
        for head, (candidates, token) in enumerate(zip(draft, answer[place + 1 :])):  # noqa: B905 -- the answer ends
            if token in candidates:
                hits[place, head] = candidates.index(token)
    return hits


class RankRecorder:
    """Answers questions by plain decoding, in steps that draft every candidate that is to be recorded."""

    def __init__(self, decoder: Decoder, ranks: Sequence[int]) -> None:
        """Use a decoder, which must not be used otherwise meanwhile."""
        tree = recording_tree(ranks)
        nodes = {path: node for node, path in enumerate(tree.paths, start=1)}
        self._nodes = [[nodes[(0,) * head + (rank,)] for rank in range(count)] for head, count in enumerate(ranks)]
        self._drafts: list[list[list[int]]] = []  # the candidates of each head in each step of the current answer
        self._decoder = decoder
        decoder.set_profile(tree)
        decoder.accept = self._accept_root
        self.answers: list[AnswerHits] = []
        self._pasts: list[float] = []

    def answer(self, question: Question, _shift: int) -> Measurement:
        """Answer a question and keep the ranks of its tokens."""
        self._drafts.clear()
        timed = generate_timed(self._decoder, question.ids, question.max_new_tokens)
        if self._drafts:  # an answer of one token takes no step
            hits = ranks_in_answer(self._drafts, timed.tokens)
            self.answers.append(AnswerHits(question.prompt, question.prompt % 2 == 0, hits))
            self._pasts += [len(question.ids) + place for place in range(len(hits))]
        return Measurement(question, timed, {})

    @property
    def mean_past(self) -> float:
        """Mean number of tokens that a step found in the past."""
        return float(np.mean(self._pasts))

    def _accept_root(
        self, tree: TokenTree, tokens: Sequence[int], argmax: Sequence[int], _logits: RowReader, /
    ) -> Accepted:
        drafted = tree.size > 1  # at the end of the context there is no room for a tree
        self._drafts.append([[tokens[node] if drafted else -1 for node in nodes] for nodes in self._nodes])
        return [0], argmax[0]


def measure_acceptance(
    decoder: Decoder,
    encoder: PromptEncoder,
    prompts: Sequence[Turns],
    ranks: tuple[int, ...],
    *,
    max_new_tokens: int,
    first_only: bool,
    report: Callable[[Measurement | Skipped], None],
) -> Acceptance:
    """Answer prompts and return how well the heads predicted the answers; every other conversation is for checking.

    Args:
        decoder: A greedy decoder; its tree and rule are replaced.
        encoder: The bundle's chat template and tokenizer.
        prompts: The user messages of each conversation.
        ranks: Number of candidates of each head to record.
        max_new_tokens: Maximum number of tokens of an answer.
        first_only: Whether only the first message of each conversation is asked.
        report: Called with each answer, and with each message that does not fit the context.

    Raises:
        PromptError: A prompt cannot be written by the chat template, or no step was taken.
    """
    recorder = RankRecorder(decoder, ranks)
    context = decoder.backend.model.context
    for found in converse(
        {"": recorder}, encoder, context, prompts, max_new_tokens=max_new_tokens, first_only=first_only
    ):
        report(found if isinstance(found, Skipped) else found[""])
    if not recorder.answers:
        raise PromptError(f"no step was taken on the {len(prompts)} prompts; expected answers of two tokens or more")
    return Acceptance(ranks, recorder.mean_past, tuple(recorder.answers))
