"""Chat templates: Jinja templates that turn a conversation into the text format that the model was trained on.

A template is untrusted code that comes with a model. It runs in Jinja's sandbox in a separate process
(`template_process`) with limited memory and time: whatever it does ends within seconds, with a PromptError.
"""

from __future__ import annotations

from medusa_runtime.errors import PromptError
from medusa_runtime.template_process import TEMPLATE_PROCESS
from medusa_runtime.template_worker import MAX_LENGTH

__all__ = ["MAX_LENGTH", "MAX_SOURCE", "ChatTemplate"]

MAX_SOURCE = 1 << 20  # characters of a template


class ChatTemplate:
    """A chat template.

    Args:
        source: Jinja source of the template.
        special_tokens: Special tokens that the template may use, such as "bos_token", with their texts.

    Raises:
        PromptError: The template is not valid Jinja or is too long.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        if len(source) > MAX_SOURCE:
            raise PromptError(
                f"the chat template has {len(source)} characters, expected at most {MAX_SOURCE}: "
                "build the bundle with another --chat-template"
            )
        try:
            TEMPLATE_PROCESS.render({"source": source, "names": None})
        except PromptError as error:
            raise PromptError(f"the chat template is not valid: {error}") from None
        self._source = source
        self._special_tokens = dict(special_tokens)

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as text.

        Args:
            messages: The conversation; each message has "role" and "content".
            add_generation_prompt: End the text where the model's answer begins.

        Raises:
            PromptError: A message is malformed, or the template rejects the conversation, with its reason.
        """
        _check_messages(messages)
        names = {
            **self._special_tokens,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        try:
            return TEMPLATE_PROCESS.render({"source": self._source, "names": names})
        except PromptError as error:
            raise PromptError(f"the chat template cannot render this conversation: {error}") from None


def _check_messages(messages: list[dict[str, str]]) -> None:
    if not messages:
        raise PromptError("the conversation is empty; give at least one message")
    written = 0
    for index, message in enumerate(messages):
        texts = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None,)
        if not all(isinstance(text, str) for text in texts):
            raise PromptError(f"message {index} must have texts for 'role' and 'content', got {message!r:.80}")
        written += sum(len(value) for value in message.values() if isinstance(value, str))
    if written > MAX_LENGTH:
        raise PromptError(f"the conversation has {written} characters, expected at most {MAX_LENGTH}; shorten it")
