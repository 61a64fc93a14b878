r"""Splits a chat template into the parts that it writes around the turns of a conversation, as token ids.

A ChatML template, for example, gives `before_user` = `<|im_start|>user\n`, `ends.user` = `<|im_end|>`,
`user_to_answer` = `\n<|im_start|>assistant\n`, `ends.answer` = `<|im_end|>` and `answer_to_user` =
`\n<|im_start|>user\n`.
"""

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
    """The tokens that end a generated segment.

    Attributes:
        eos: Ids that end any segment.
        user: The id by which the template ends a user turn, `None` if it uses no special token. It is forced after a
            user turn that ended otherwise.
        answer: The same of an answer.
    """

    eos: tuple[int, ...]
    user: int | None = None
    answer: int | None = None


@dataclass(frozen=True)
class TemplateParts:
    """The token ids that a chat template writes around the turns.

    Attributes:
        before_user: Before the first user turn.
        user_to_answer: Between a user turn and its answer, without `ends.user`.
        answer_to_user: Between an answer and the next user turn, without `ends.answer`.
        ends: The tokens that end user turns and answers.
    """

    before_user: Ids
    user_to_answer: Ids
    answer_to_user: Ids
    ends: EndTokens


def split_template(tokenizer: Any, eos: Iterable[int]) -> TemplateParts:
    """Split the tokenizer's chat template into its parts.

    `ends.user` is `None` if no special token ends a user turn; then the model cannot generate user turns.

    Raises:
        PromptError: The template rewrites, repeats or reorders turns, so that it has no fixed parts.
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
    before_user, user_to_answer, answer_to_user, closing = parts.groups()
    if closing != user_to_answer or single != before_user + first + user_to_answer:
        raise PromptError(f"the chat template writes a turn differently when other turns follow or precede; {EXPECTED}")
    if reasoned.count(answer) != 2:
        raise PromptError(f"the chat template rewrites earlier answers; {EXPECTED}")
    answer_end, after_answer = split_end(tokenizer, answer_to_user, eos)
    between = encode(tokenizer, user_to_answer)
    user_end = int(between[0]) if len(between) and int(between[0]) in special_ids(tokenizer) else None
    return TemplateParts(
        before_user=encode(tokenizer, before_user),
        user_to_answer=between if user_end is None else between[1:],
        answer_to_user=after_answer,
        ends=EndTokens(eos, user_end, answer_end),
    )


def first_turn_prefix(tokenizer: Any) -> Ids:
    """Return the token ids before a first user turn.

    How the template treats later turns and earlier answers does not matter here.

    Raises:
        PromptError: The chat template does not write the user turn exactly once.
    """
    first = SENTINELS[0]
    (text,) = render(tokenizer, [_messages([first], [])])
    prefix, found, rest = text.partition(first)
    if not found or first in rest:
        raise PromptError(f"the chat template does not write a user turn exactly once; {EXPECTED}")
    return encode(tokenizer, prefix)


def later_turns(tokenizer: Any, turns: Turns, eos: tuple[int, ...]) -> list[Ids]:
    """Return the token ids of each user turn after the first, with what the template writes around it.

    They reach from the end of the previous answer, without its end token, to the start of the turn's own answer.
    """
    answer = SENTINELS[1]
    texts = render(tokenizer, [_messages(turns[:count], [answer] * (count - 1)) for count in range(2, len(turns) + 1)])
    return [split_end(tokenizer, text.rpartition(answer)[2], eos)[1] for text in texts]


def split_end(tokenizer: Any, text: str, eos: tuple[int, ...]) -> tuple[int | None, Ids]:
    """Tokenise the text after an answer; return its end token, `None` if it starts with none of `eos`, and the rest."""
    ids = encode(tokenizer, text.lstrip())
    if len(ids) and int(ids[0]) in eos:
        return int(ids[0]), ids[1:]
    return None, encode(tokenizer, text)


def encode(tokenizer: Any, text: str) -> Ids:
    """Return the token ids of a text, without added special tokens."""
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"] if text else [], np.int64)


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of special tokens, including added tokens that are only marked as special."""
    marked = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *marked}


def _messages(turns: Iterable[str], answers: Iterable[str]) -> list[dict[str, str]]:
    """Interleave user turns and answers; there is one answer fewer."""
    asked = [{"role": "user", "content": turn} for turn in turns]
    replies = [{"role": "assistant", "content": answer} for answer in answers]
    return [message for pair in zip(asked, [*replies, {}], strict=True) for message in pair if message]
