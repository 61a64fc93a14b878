"""How a bundle turns text into token ids: its chat template and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medusa_runtime.arguments import as_messages
from medusa_runtime.bundle import TOKENIZER, Bundle
from medusa_runtime.chat_template import ChatTemplate
from medusa_runtime.errors import BundleError, CapacityError, PromptError
from medusa_runtime.tokenizer import Tokenizer

Prompt = str | Sequence[Mapping[str, str]]  # one user message, or messages with "role" and "content"


MIN_CHARACTERS_PER_TOKEN = 64  # that every token of the context may stand for, should the longest token be shorter


class PromptEncoder:
    """Lays prompts out by a bundle's chat template, if it has one.

    max_characters: characters that a prompt may have, as many as the context's tokens could stand for if each were the
    longest of the vocabulary; a longer one is refused before it is laid out and tokenised.

    chat_template: the name of another of the model's own templates, which `Bundle.chat_template_names` lists. Raises
    BundleError for files that do not serve.
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
        """Whether messages can be laid out; without a template only raw text can."""
        return self._template is not None

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Lay a prompt out by the chat template and turn it into token ids.

        `raw` takes a text as it stands, with the special tokens that the tokenizer itself adds. Raises PromptError
        for an empty prompt, CapacityError for one of more than `max_characters` characters.
        """
        if isinstance(prompt, str):
            if not prompt.strip():
                raise PromptError("the prompt is empty: give some text")
            self._check_length(len(prompt))
            if raw:
                return self.tokenizer.encode(prompt, add_special_tokens=True)
            prompt = [{"role": "user", "content": prompt}]
        elif raw:
            raise PromptError("a raw prompt is one text; messages need the chat template")
        messages = as_messages(prompt)
        if self._template is None:
            raise BundleError(
                f"{self._root} has no chat template; give a text that is laid out already: raw=True, or generate --raw"
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
