"""One answer in the making: its tokens and the rules that end it."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field


@dataclass
class Sequence:
    """The tokens of a prompt and its answer so far.

    `stop_ids` end the answer and belong to it; `max_new_tokens` bounds it; `context` bounds prompt and answer
    together. `finish` is None while the answer may go on, then "stop", "length" or "context".
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop_ids: frozenset[int]
    context: int
    answer: list[int] = field(default_factory=list)
    finish: str | None = None

    def __post_init__(self) -> None:
        """Find the most tokens that the answer may have."""
        self._limit = min(self.max_new_tokens, self.context - len(self.prompt))

    @property
    def length(self) -> int:
        """Tokens of prompt and answer together."""
        return len(self.prompt) + len(self.answer)

    @property
    def last(self) -> int:
        """The last token: the next root."""
        return self.answer[-1] if self.answer else self.prompt[-1]

    def extend(self, tokens: Ids[int]) -> list[int]:
        """Take what a step gave, up to where plain decoding would have ended; return what was taken."""
        if self.finish is not None:
            return []
        room = self._limit - len(self.answer)
        taken = list(tokens[:room])
        if not self.stop_ids.isdisjoint(taken):
            end = next(index for index, token in enumerate(taken) if token in self.stop_ids)
            taken, self.finish = taken[: end + 1], "stop"
        elif len(taken) == room:
            self.finish = "length" if self._limit == self.max_new_tokens else "context"
        self.answer += taken
        return taken
