"""Encodes prompts: renders messages with the bundle's chat template and tokenises the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medusa_runtime.arguments import as_messages
from medusa_runtime.bundle import TOKENIZER, Bundle
from medusa_runtime.chat_template import ChatTemplate
from medusa_runtime.errors import BundleError, CapacityError, PromptError
from medusa_runtime.tokenizer import Tokenizer

Prompt = str | Sequence[Mapping[str, str]]  # one user message, or messages with "role" and "content"

MIN_CHARACTERS_PER_TOKEN = 64  # allowed for each token of the context, even if the longest token is shorter


class PromptEncoder:
    """Turns prompts into token ids with a bundle's chat template and tokenizer.

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
        self.max_characters = self._context * max(self.tokenizer.longest_token, MIN_CHARACTERS_PER_TOKEN)

    @property
    def has_chat_template(self) -> bool:
        """Whether the bundle has a chat template; without one, only raw text can be encoded."""
        return self._template is not None

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Render a prompt with the chat template and return its token ids.

        Args:
            prompt: One user message, or a list of messages with "role" and "content".
            raw: Tokenise a text as it is, without the chat template but with the tokenizer's own special tokens.

        Raises:
            PromptError: The prompt is empty, has a wrong type, or the template rejects it.
            CapacityError: The prompt has more than `max_characters` characters.
            BundleError: The bundle has no chat template and `raw` is False.
        """
        if isinstance(prompt, str):
            if not prompt.strip():
                raise PromptError("the prompt is empty: give some text")
            self._check_length(len(prompt))
            if raw:
                return self.tokenizer.encode(prompt, add_special_tokens=True)
            prompt = [{"role": "user", "content": prompt}]
        elif raw:
            raise PromptError(
                "a raw prompt must be one text, but this is a list of messages; pass raw=False to use the chat template"
            )
        messages = as_messages(prompt)
        if self._template is None:
            raise BundleError(
                f"{self._root} has no chat template, expected raw text: pass raw=True, or --raw on the command line"
            )
        texts = (text for message in messages for text in message.values() if isinstance(text, str))
        self._check_length(sum(map(len, texts)))
        text = self._template.render(messages)
        self._check_length(len(text))
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _check_length(self, characters: int) -> None:
        if characters > self.max_characters:
            raise CapacityError(
                f"the prompt has {characters} characters, expected at most {self.max_characters}, more than the "
                f"context of {self._context} tokens can hold; shorten it"
            )
