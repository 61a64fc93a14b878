"""The state of one sequence: the prompt, the answer so far, and the limits that end it."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from threading import Thread, current_thread
from typing import TYPE_CHECKING

from medusa_runtime.errors import BusyError

if TYPE_CHECKING:
    from medusa_runtime.accept import AcceptRule
    from medusa_runtime.drafting.drafter import Drafter


@dataclass
class SequenceState:
    """Token ids of a prompt and of its answer so far.

    Attributes:
        prompt: Token ids of the prompt.
        max_new_tokens: Maximum number of tokens of the answer.
        stop_ids: Token ids that end the answer; the one that does is its last token.
        context: Maximum number of tokens of prompt and answer together.
        rule: The acceptance rule; None is the decoder's.
        summaries: Whether the backend summarises the rows of each step, if it can, for a rule that reads them.
        reused: Tokens of the prompt whose rows an earlier sequence had computed.
        answer: Token ids of the answer so far. It is always the same list.
        owner: Thread that may continue an unfinished answer; None after it was aborted.
        drafter: Chooses what each step verifies; None is the decoder's tree.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop_ids: frozenset[int]
    context: int
    rule: AcceptRule | None = field(default=None, compare=False, repr=False)
    summaries: bool = False
    reused: int = field(default=0, compare=False)
    answer: list[int] = field(default_factory=list)
    owner: Thread | None = field(default=None, compare=False, repr=False)
    drafter: Drafter | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Compute how many tokens the answer may have at most."""
        self._limit = min(self.max_new_tokens, self.context - len(self.prompt))

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended: "stop" (a stop token) or "length" (a limit was reached); None while it may go on."""
        answer = self.answer
        if answer and answer[-1] in self.stop_ids:
            return "stop"
        return None if len(answer) < self._limit else "length"

    @property
    def room(self) -> int:
        """How many tokens the limits allow the answer to gain."""
        return self._limit - len(self.answer)

    @property
    def length(self) -> int:
        """Number of tokens of prompt and answer together."""
        return len(self.prompt) + len(self.answer)

    @property
    def last_token(self) -> int:
        """The last token id, which is the root of the next step's tree."""
        return self.answer[-1] if self.answer else self.prompt[-1]

    def clip(self, tokens: Ids[int]) -> list[int]:
        """Return a step's tokens up to a stop token or the limit, where plain decoding would have ended too."""
        if self.finish_reason is not None:
            return []
        kept = list(tokens[: self.room])
        if self.stop_ids.isdisjoint(kept):
            return kept
        end = next(index for index, token in enumerate(kept) if token in self.stop_ids)
        return kept[: end + 1]

    def extend(self, tokens: Ids[int]) -> list[int]:
        """Append `clip(tokens)` to the answer and return it."""
        kept = self.clip(tokens)
        self.answer += kept
        return kept

    def check_owner(self, what: str) -> None:
        """Raise BusyError while the answer is unfinished and belongs to another thread that is alive.

        Args:
            what: Names the backend in the error message.
        """
        owner = self.owner if self.finish_reason is None else None
        if owner is not None and owner is not current_thread() and owner.is_alive():
            raise BusyError(
                f"{what} is in the middle of an answer for thread {owner.name!r}, expected calls from that thread "
                "only; wait for the end of the answer, end it (Decoder.abort), or load a second backend"
            )
