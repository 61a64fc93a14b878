"""Drafts of one answer: what the next step verifies, from the heads, the text before, or a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from medusa_profiles.profile import TreeProfile

from medusa_runtime.drafting.controller import Choice, Controller, Experience
from medusa_runtime.drafting.ngram_index import Match, NgramIndex
from medusa_runtime.structured.answer_grammar import NOT_FORCED

if TYPE_CHECKING:
    from medusa_runtime.drafting.draft_tree import DraftTree
    from medusa_runtime.sequence import SequenceState
    from medusa_runtime.structured.answer_grammar import AnswerGrammar


class Draft(NamedTuple):
    """What a step verifies.

    Args:
        profile: Tree of the heads' candidates; plain decoding has none.
        literals: Tokens of a chain beside them.
    """

    profile: TreeProfile
    literals: Sequence[int] = ()


class Drafter:
    """Chooses the drafts of one answer.

    Args:
        experience: What the engine has learned from other answers, and learns from this one.
        grammar: Follows the answer through what it has to match; None if it may be anything. Tokens that it forces are
            drafted too, and those that it forbids are not.
    """

    def __init__(self, experience: Experience, grammar: AnswerGrammar | None = None) -> None:
        self._controller, self._grammar = Controller(experience), grammar
        self._index: NgramIndex | None = None
        self._most = max(experience.options.literals, default=0)
        self._match: Match | None = None
        self._forced = NOT_FORCED

    def next(self, sequence: SequenceState) -> Draft:
        """Return the draft behind the tokens so far.

        Args:
            sequence: The answer, always the same one.
        """
        index, available, forced = self._index, 0, NOT_FORCED
        self._match, self._forced = None, NOT_FORCED
        if self._grammar is not None and self._most:
            forced = self._grammar.forced(sequence.answer, min(self._most, sequence.room))
        if self._most:
            if index is None or len(index) > sequence.length:  # tokens were taken back
                index = self._index = NgramIndex(sequence.prompt)
            index.extend(sequence.answer[len(index) - len(sequence.prompt) :])
            self._match = index.match()
            if self._match is not None:
                available = min(len(index) - self._match.position, sequence.room)
                if self._grammar is not None:
                    found = index.continuation(self._match.position, min(self._most, available))
                    available = self._grammar.allowed(sequence.answer, found)
        choice = self._controller.choose(self._match, available, forced)
        if choice.forced:
            self._match, self._forced = None, forced
            return Draft(choice.profile, _padded(forced.tokens, choice.literals, sequence))
        if not choice.literals or index is None or self._match is None:
            return Draft(choice.profile)
        found = index.continuation(self._match.position, min(choice.literals, available))
        return Draft(choice.profile, _padded(found, choice.literals, sequence))

    def observe(self, tree: DraftTree, path: Sequence[int], ms: float) -> None:
        """Learn from the step that verified the draft.

        Args:
            tree: What was verified.
            path: Accepted nodes from the root on.
            ms: Duration of the step.
        """
        from_literals = len(path) > 1 and path[1] >= tree.first_literal
        if self._forced.tokens:
            self._controller.observe_forced(self._forced, tree.literals, len(path) - 1)
        self._controller.observe(Choice(tree.profile, tree.literals), self._match, len(path) - 1, from_literals, ms)


def _padded(tokens: Sequence[int], length: int, sequence: SequenceState) -> list[int]:
    """Return exactly `length` tokens: the first ones, or all and the last token of the sequence as padding."""
    return [*tokens[:length], *[sequence.last_token] * (length - len(tokens))]
