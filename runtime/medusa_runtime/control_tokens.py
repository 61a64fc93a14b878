"""Control tokens: the tokens that structure a prompt, such as <|im_end|>."""

from __future__ import annotations

import re

from medusa_runtime.tokenizer import Tokenizer

_BAR = re.compile(r"<\|.+\|>", re.DOTALL)
_BRACKETS = re.compile(r"<.+>|\[.+\]", re.DOTALL)


def find_control_tokens(tokenizer: Tokenizer, template: str) -> dict[str, int]:
    """Return the texts and ids of a tokenizer's control tokens.

    These are its special tokens, and of its other added tokens those like <|…|>, and those like <…> or […] that the
    chat template writes, such as <tool_call>. White space is no control token.

    Args:
        tokenizer: The tokenizer.
        template: Source of the chat template, "" if there is none.
    """
    return {
        facts.content: token
        for token, facts in tokenizer.added_tokens.items()
        if facts.content.strip() and (facts.special or _is_like_one(facts.content, template))
    }


def _is_like_one(text: str, template: str) -> bool:
    return bool(_BAR.fullmatch(text) or (text in template and _BRACKETS.fullmatch(text)))
