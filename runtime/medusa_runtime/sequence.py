"""One answer in the making: its tokens and the rules that end it."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from threading import Thread


@dataclass
class SequenceState:
    """The tokens of a prompt and its answer so far.

    `stop_ids` end the answer and belong to it; `max_new_tokens` bounds it; `context` bounds prompt and answer
    together. `owner` is the thread that an unfinished answer belongs to; None when it has been given up.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop_ids: frozenset[int]
    context: int
    answer: list[int] = field(default_factory=list)
    owner: Thread | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Find the most tokens that the answer may have."""
        self._limit = min(self.max_new_tokens, self.context - len(self.prompt))

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended: "stop" (a stop token) or "length" (a limit was reached); None while it may go on."""
        answer = self.answer
        if answer and answer[-1] in self.stop_ids:
            return "stop"
        return None if len(answer) < self._limit else "length"

    @property
    def length(self) -> int:
        """Tokens of prompt and answer together."""
        return len(self.prompt) + len(self.answer)

    @property
    def last_token(self) -> int:
        """The last token: the next root."""
        return self.answer[-1] if self.answer else self.prompt[-1]

    def clip(self, tokens: Ids[int]) -> list[int]:
        """Return those of a step's tokens that belong to the answer: up to where plain decoding would have ended."""
        if self.finish_reason is not None:
            return []
        taken = list(tokens[: self._limit - len(self.answer)])
        if self.stop_ids.isdisjoint(taken):
            return taken
        end = next(index for index, token in enumerate(taken) if token in self.stop_ids)
        return taken[: end + 1]

    def extend(self, tokens: Ids[int]) -> list[int]:
        """Add what `clip` leaves of a step's tokens to the answer, at once; return it."""
        taken = self.clip(tokens)
        self.answer += taken
        return taken
