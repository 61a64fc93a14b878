"""Chat templates: Jinja templates that turn a conversation into the text format that the model was trained on.

A template is untrusted code that comes with a model. It runs in Jinja's sandbox in a separate process
(`template_process`) with limited memory and time: whatever it does ends within seconds, with a PromptError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medusa_profiles.profile import shown

from medusa_runtime.errors import PromptError
from medusa_runtime.template_process import TEMPLATE_PROCESS
from medusa_runtime.template_worker import MAX_LENGTH

__all__ = ["MAX_LENGTH", "MAX_SOURCE", "ChatTemplate"]

MAX_SOURCE = 1 << 20  # characters of a template

_SET = ("messages", "tools", "add_generation_prompt", "continue_final_message")
_FUNCTIONS = ("raise_exception", "strftime_now", "namespace")
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """A chat template.

    Args:
        source: Jinja source of the template.
        special_tokens: Special tokens that the template may use, such as "bos_token", with their texts.

    Attributes:
        source: Jinja source of the template.
        reserved_names: Names that are set for the template and cannot be chosen by callers.

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
            raise type(error)(f"the chat template is not valid: {error}") from None
        self.source = source
        self._special_tokens = dict(special_tokens)
        self.reserved_names = frozenset((*_SET, *_FUNCTIONS, *_TOKENS, *special_tokens))

    def render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: list[dict[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """Render a conversation as text.

        Args:
            messages: The conversation; each message has texts for "role" and "content".
            add_generation_prompt: End the text where the model's answer begins.
            tools: Definitions of the tools that the model may call.
            arguments: Further names for the template, none of `reserved_names`.

        Raises:
            PromptError: A message is malformed, or the template rejects the conversation, with its reason.
        """
        return self._render(messages, add_generation_prompt, tools, arguments, ())

    def render_marked(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: list[dict[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        control_tokens: Sequence[str],
    ) -> str:
        """Render a conversation as text that shows which control tokens the template has written.

        Args:
            messages: The conversation; each message has texts for "role" and "content".
            add_generation_prompt: End the text where the model's answer begins.
            tools: Definitions of the tools that the model may call.
            arguments: Further names for the template, none of `reserved_names`.
            control_tokens: Texts of the control tokens.

        Returns:
            What `render` returns, but the characters of control tokens, and of parts of control tokens, that the
            template has written are replaced by those of `template_worker.shadow_table`, as nobody else can write them.

        Raises:
            PromptError: As in `render`; or the template changes or compares control tokens, so that they are not known.
        """
        return self._render(messages, add_generation_prompt, tools, arguments, control_tokens)

    def _render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None,
        arguments: Mapping[str, Any] | None,
        control_tokens: Sequence[str],
    ) -> str:
        _check_messages(messages)
        names = {
            "documents": None,
            **(arguments or {}),
            **self._special_tokens,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
        }
        request = {"source": self.source, "names": names}
        if control_tokens:
            request |= {"controls": list(control_tokens), "special": sorted(self._special_tokens)}
        try:
            return TEMPLATE_PROCESS.render(request)
        except PromptError as error:
            raise type(error)(f"the chat template cannot render this conversation: {error}") from None


def _check_messages(messages: list[dict[str, Any]]) -> None:
    if not messages:
        raise PromptError("the conversation is empty; give at least one message")
    written = 0
    for index, message in enumerate(messages):
        texts = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None,)
        if not all(isinstance(text, str) for text in texts):
            raise PromptError(f"message {index} must have texts for 'role' and 'content', got {shown(message)}")
        written += sum(len(value) for value in message.values() if isinstance(value, str))
    if written > MAX_LENGTH:
        raise PromptError(f"the conversation has {written} characters, expected at most {MAX_LENGTH}; shorten it")
