"""Encodes prompts: renders messages with the bundle's chat template and tokenises the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.arguments import as_bool, as_token_ids
from medusa_runtime.bundle import TOKENIZER, Bundle
from medusa_runtime.chat_template import ChatTemplate
from medusa_runtime.errors import BundleError, CapacityError, PromptError
from medusa_runtime.final_message import FinalMessage
from medusa_runtime.json_values import JsonCopier
from medusa_runtime.messages import read_messages
from medusa_runtime.sanitizer import Sanitizer
from medusa_runtime.template_inputs import read_template_arguments, read_tools
from medusa_runtime.tokenizer import Tokenizer

# one user message or a raw text, token ids, or messages in the form of OpenAI's API
Prompt = str | Sequence[int] | NDArray[np.integer[Any]] | Sequence[Mapping[str, Any]]

MIN_CHARACTERS_PER_TOKEN = 64  # allowed for each token of the context, even if the longest token is shorter


class PromptEncoder:
    """Turns prompts into token ids with a bundle's chat template and tokenizer; several threads may use it at once.

    Args:
        bundle: The opened bundle.
        chat_template: One of `Bundle.chat_template_names`; None is the bundle's default.

    Attributes:
        tokenizer: The bundle's tokenizer.
        max_characters: Maximum number of characters of a prompt: as many as the context would hold if every token were
            the longest one of the vocabulary. A longer prompt is rejected before it is rendered and tokenised.

    Raises:
        BundleError: The tokenizer or the chat template is missing or invalid.
    """

    def __init__(self, bundle: Bundle, chat_template: str | None = None) -> None:
        self.tokenizer = Tokenizer(bundle.tokenizer, str(bundle.root / TOKENIZER))
        template = bundle.chat_template if chat_template is None else bundle.named_chat_template(chat_template)
        self._template = None if template is None else ChatTemplate(template, bundle.special_tokens)
        self._root = bundle.root
        self._context = bundle.model.context
        self._vocabulary = bundle.model.vocab_size
        self._sanitizer: Sanitizer | None = None  # made when it is needed first
        self.max_characters = self._context * max(self.tokenizer.longest_token, MIN_CHARACTERS_PER_TOKEN)

    @property
    def has_chat_template(self) -> bool:
        """Whether the bundle has a chat template; without one, only raw text and token ids can be encoded."""
        return self._template is not None

    def encode(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_arguments: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        sanitize: bool = False,
    ) -> list[int]:
        """Render a prompt with the chat template and return its token ids.

        Args:
            prompt: One user message; or messages with "role" and "content", in the form of OpenAI's API; or token ids,
                which are returned as they are.
            raw: Tokenise a text as it is, without the chat template but with the tokenizer's own special tokens.
            tools: Definitions of the tools that the model may call, in OpenAI's form; for messages only, as the next
                two.
            chat_template_arguments: Further names for the chat template, such as `{"enable_thinking": False}`.
            continue_final_message: Let the model continue the last message, a text of the assistant, in place of
                answering it.
            sanitize: Encode control tokens such as `<|im_end|>` in messages, tools and arguments, or in a raw text, as
                ordinary text, so that only the chat template writes control tokens.

        Raises:
            PromptError: The prompt is empty, has a wrong type, or the template rejects it.
            CapacityError: The prompt has more than `max_characters` characters, or more tokens than the context.
            BundleError: The bundle has no chat template and `raw` is False, or `sanitize` is not possible with it.
            ArgumentError: `raw`, `continue_final_message` or `sanitize` is not a bool.
        """
        raw, sanitize = as_bool("raw", raw), as_bool("sanitize", sanitize)
        continued = as_bool("continue_final_message", continue_final_message)
        for_template = {
            "tools": _is_set(tools),
            "chat_template_arguments": _is_set(chat_template_arguments),
            "continue_final_message": continued,
        }
        if is_token_ids(prompt):
            _refuse("a prompt of token ids", for_template | {"sanitize": sanitize})
            return self._checked_ids(prompt)
        if isinstance(prompt, str):
            if not prompt:
                raise PromptError("the prompt is empty: give some text")
            self._check_length(len(prompt))
            if raw:
                _refuse("a raw prompt", for_template)
                return self._encode_raw(prompt, sanitize)
            prompt = [{"role": "user", "content": prompt}]
        elif raw:
            raise PromptError(
                "a raw prompt must be one text, but this is a list of messages; pass raw=False to use the chat template"
            )
        return self._encode_messages(prompt, tools, chat_template_arguments, continued, sanitize)

    def _checked_ids(self, prompt: Any) -> list[int]:
        is_flat = not isinstance(prompt, np.ndarray) or prompt.ndim == 1
        if is_flat and len(prompt) > self._context:
            raise CapacityError(
                f"the prompt has {len(prompt)} tokens, expected at most {self._context}, the context; shorten it"
            )
        ids: list[int] = as_token_ids(prompt, self._vocabulary).tolist()
        return ids

    def _encode_raw(self, text: str, sanitize: bool) -> list[int]:
        if sanitize:
            return self._own_sanitizer().encode_raw(text)
        return self.tokenizer.encode(text, add_special_tokens=True)

    def _encode_messages(
        self, prompt: object, tools: object, arguments: object, continued: bool, sanitize: bool
    ) -> list[int]:
        copier = JsonCopier()
        messages = read_messages(prompt, copier)
        if self._template is None:
            raise BundleError(
                f"{self._root} has no chat template, expected raw text: pass raw=True, or --raw on the command line"
            )
        names: dict[str, Any] = {
            "tools": read_tools(tools, copier),
            "arguments": read_template_arguments(arguments, self._template.reserved_names, copier),
        }
        self._check_length(copier.characters)
        final = FinalMessage(messages) if continued else None
        if final is not None:
            messages = final.messages
        sanitizer = self._own_sanitizer() if sanitize else None
        if sanitizer is None:
            text = self._template.render(messages, not continued, **names)
        else:
            controls = sanitizer.control_tokens
            text = self._template.render_marked(messages, not continued, **names, control_tokens=controls)
        if final is not None:
            text = final.cut(text)
        self._check_length(len(text))
        if sanitizer is not None:
            return sanitizer.encode_rendered(text)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _own_sanitizer(self) -> Sanitizer:
        if self._sanitizer is None:
            self._sanitizer = Sanitizer(self.tokenizer, self._template)
        return self._sanitizer

    def _check_length(self, characters: int) -> None:
        if characters > self.max_characters:
            raise CapacityError(
                f"the prompt has {characters} characters, expected at most {self.max_characters}, more than the "
                f"context of {self._context} tokens can hold; shorten it"
            )


def is_token_ids(prompt: object) -> bool:
    """Whether a prompt is meant as token ids, judged by its first element."""
    if isinstance(prompt, np.ndarray):
        return True
    if not isinstance(prompt, Sequence) or isinstance(prompt, (str, bytes, bytearray)) or not prompt:
        return False
    return isinstance(prompt[0], (int, float, np.generic))


def _is_set(option: object) -> bool:
    """Whether an option was passed: None, and an empty list or mapping, mean that it was left out."""
    return option is not None and not (isinstance(option, (Sequence, Mapping)) and len(option) == 0)


def _refuse(what: str, options: Mapping[str, bool]) -> None:
    if name := next((name for name, is_set in options.items() if is_set), None):
        raise PromptError(f"{what} was passed together with {name}; expected messages: pass messages, or leave it out")
