"""Finds where the last message of a conversation ends in the rendered text, so that the model continues it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from medusa_profiles.profile import shown

from medusa_runtime.errors import PromptError


class FinalMessage:
    """The last message of a conversation, marked so that its end is found in the rendered text.

    Args:
        messages: The conversation; its last message must be a text of the assistant.

    Attributes:
        messages: The conversation to render, with a random mark at the end of the last message.

    Raises:
        PromptError: The last message is not a text of the assistant.
    """

    def __init__(self, messages: Sequence[dict[str, Any]]) -> None:
        last = messages[-1]
        if last["role"] != "assistant" or "tool_calls" in last:
            got = "one with tool calls" if "tool_calls" in last else f"one of the role {shown(last['role'])}"
            raise PromptError(
                f"the last message is {got}; with continue_final_message, expected a text of the assistant for the "
                "model to continue"
            )
        self._content: str = last["content"]
        self._mark = secrets.token_hex(16)
        marked = {**last, "content": f"{self._content}{self._mark} "}
        self.messages = [*messages[:-1], marked]

    def cut(self, text: str) -> str:
        """Return the rendered text up to the end of the last message's content.

        Where the template strips the message, white space at the end of the content is left out.

        Raises:
            PromptError: The content is not in the text as it was passed.
        """
        at, content = text.rfind(self._mark), self._content.strip()
        kept = text[:at] if text.startswith(self._mark + " ", at) or not content else text[:at].rstrip()
        if at < 0 or not kept.rstrip().endswith(content):
            raise PromptError(
                f"the last message, {shown(self._content)}, is not in the text that the chat template writes, or was "
                "changed by it, so it cannot be continued; pass another message, or continue_final_message=False"
            )
        return kept
