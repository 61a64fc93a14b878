"""How a bundle turns text into token ids: its chat template and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medusa_runtime.arguments import conversation
from medusa_runtime.bundle import TOKENIZER, Bundle
from medusa_runtime.chat import ChatTemplate
from medusa_runtime.errors import BundleError, PromptError
from medusa_runtime.text import Tokenizer

Prompt = str | Sequence[Mapping[str, str]]  # one user message, or messages with "role" and "content"


class Layout:
    """Lays prompts out by a bundle's chat template, if it has one.

    chat_template: the name of another of the model's own templates, which `Bundle.chat_template_names` lists. Raises
    BundleError for files that do not serve.
    """

    def __init__(self, bundle: Bundle, chat_template: str | None = None) -> None:
        self.tokenizer = Tokenizer(bundle.tokenizer, str(bundle.root / TOKENIZER))
        template = bundle.chat_template if chat_template is None else bundle.named_chat_template(chat_template)
        self._template = None if template is None else ChatTemplate(template, bundle.special_tokens)
        self._root = bundle.root

    @property
    def has_template(self) -> bool:
        """Whether messages can be laid out; without a template only raw text can."""
        return self._template is not None

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Lay a prompt out by the chat template and turn it into token ids.

        `raw` takes a text as it stands, with the special tokens that the tokenizer itself adds. Raises PromptError
        for an empty prompt.
        """
        if isinstance(prompt, str):
            if not prompt.strip():
                raise PromptError("the prompt is empty: give some text")
            if raw:
                return self.tokenizer.encode(prompt, add_special_tokens=True)
            prompt = [{"role": "user", "content": prompt}]
        elif raw:
            raise PromptError("a raw prompt is one text; messages need the chat template")
        messages = conversation(prompt)
        if self._template is None:
            raise BundleError(f"{self._root} has no chat template; give the prompt raw, laid out by yourself")
        return self.tokenizer.encode(self._template.render(messages), add_special_tokens=False)
