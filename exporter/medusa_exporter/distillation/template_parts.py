"""The frame of a conversation: what the chat template writes around the turns, as token ids."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from medusa_runtime.errors import PromptError

from medusa_exporter.prompts import Turns, render

SENTINELS = ("medusa7sentinel1turn", "medusa7sentinel2turn", "medusa7sentinel3turn")
EXPECTED = "expected one that leaves them as they are"

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EndTokens:
    """What ends the parts that the model writes.

    eos: ids that end any part. user, answer: the id by which the template ends a user turn and an answer, which is
    forced after a part that ended otherwise; None where the template has no such token.
    """

    eos: tuple[int, ...]
    user: int | None = None
    answer: int | None = None


@dataclass(frozen=True)
class TemplateParts:
    """A template's pieces.

    opening: before a first user turn. middle: between a user turn and its answer, without `ends.user`. following:
    between an answer and the next user turn, without `ends.answer`.
    """

    opening: Ids
    middle: Ids
    following: Ids
    ends: EndTokens


def split_template(tokenizer: Any, eos: Iterable[int]) -> TemplateParts:
    """Cut the chat template into its pieces; raise PromptError where it cannot be cut.

    `ends.user` is None where no special token ends a user turn: then the model cannot write one.
    """
    eos = tuple(eos)
    one, two, three = (re.escape(sentinel) for sentinel in SENTINELS)
    first, answer, second = SENTINELS
    single, both, reasoned = render(
        tokenizer,
        [
            _messages([first], []),
            _messages([first, second], [answer]),
            _messages([first, second], [f"<think>\n{answer}\n</think>\n\n{answer}"]),
        ],
    )
    parts = re.fullmatch(f"(.*){one}(.*){two}(.*){three}(.*)", both, flags=re.DOTALL)
    if parts is None:
        raise PromptError(f"the chat template does not write the turns in their order, each once; {EXPECTED}")
    opening, middle, following, closing = parts.groups()
    if closing != middle or single != opening + first + middle:
        raise PromptError(f"the chat template writes a turn otherwise when others stand beside it; {EXPECTED}")
    if reasoned.count(answer) != 2:
        raise PromptError(f"the chat template rewrites earlier answers; {EXPECTED}")
    answer_end, after = split_end(tokenizer, following, eos)
    between = encode(tokenizer, middle)
    user_end = int(between[0]) if len(between) and int(between[0]) in special_ids(tokenizer) else None
    return TemplateParts(
        opening=encode(tokenizer, opening),
        middle=between if user_end is None else between[1:],
        following=after,
        ends=EndTokens(eos, user_end, answer_end),
    )


def first_turn_prefix(tokenizer: Any) -> Ids:
    """Token ids before a first user turn; raise PromptError where the chat template does not write that turn once.

    What the template does with later turns, and with earlier answers and their thinking, does not matter here.
    """
    first = SENTINELS[0]
    (text,) = render(tokenizer, [_messages([first], [])])
    opening, found, rest = text.partition(first)
    if not found or first in rest:
        raise PromptError(f"the chat template does not write a user turn once; {EXPECTED}")
    return encode(tokenizer, opening)


def later_turns(tokenizer: Any, turns: Turns, eos: tuple[int, ...]) -> list[Ids]:
    """Token ids of each user turn after the first with what the template writes around it.

    From the end of the answer before it, whose end token is left out, to the start of its own answer.
    """
    answer = SENTINELS[1]
    texts = render(tokenizer, [_messages(turns[:count], [answer] * (count - 1)) for count in range(2, len(turns) + 1)])
    return [split_end(tokenizer, text.rpartition(answer)[2], eos)[1] for text in texts]


def split_end(tokenizer: Any, text: str, eos: tuple[int, ...]) -> tuple[int | None, Ids]:
    """Tokenise what follows an answer; return its end token apart, None where it begins with none of `eos`."""
    ids = encode(tokenizer, text.lstrip())
    if len(ids) and int(ids[0]) in eos:
        return int(ids[0]), ids[1:]
    return None, encode(tokenizer, text)


def encode(tokenizer: Any, text: str) -> Ids:
    """Token ids of a piece of text, nothing added."""
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"] if text else [], np.int64)


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of special tokens, those the tokenizer names and those only marked as such."""
    marked = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *marked}


def _messages(turns: Iterable[str], answers: Iterable[str]) -> list[dict[str, str]]:
    """Interleave user turns and answers, which are one fewer."""
    said = [{"role": "user", "content": turn} for turn in turns]
    replies = [{"role": "assistant", "content": answer} for answer in answers]
    return [message for pair in zip(said, [*replies, {}], strict=True) for message in pair if message]
