"""Encodes prompts so that control tokens come from the chat template only, never from what users wrote.

A control token, such as <|im_end|>, in the text of a message would otherwise end the message, and what follows could
pose as the system. With a sanitizer, it is encoded as the ordinary text that it is.
"""

from __future__ import annotations

import re
import secrets

from medusa_runtime.chat_template import ChatTemplate
from medusa_runtime.control_tokens import find_control_tokens
from medusa_runtime.errors import BundleError, PromptError
from medusa_runtime.renamed_tokenizer import RenamedTokenizer
from medusa_runtime.template_worker import shadow_table
from medusa_runtime.tokenizer import Tokenizer

# roles from which templates make control tokens, as in '<|' + message.role + '|>'
_ROLES = ("system", "developer", "user", "assistant", "model", "tool", "function", "ipython", "observation")
_CONVERSATION = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]


class Sanitizer:
    """Encodes texts without control tokens of users; may be used by several threads at once.

    Args:
        tokenizer: The bundle's tokenizer.
        template: The chat template, if there is one.

    Attributes:
        control_tokens: Texts of the control tokens.

    Raises:
        BundleError: The control tokens of the tokenizer or the template cannot be told from text.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._ids = find_control_tokens(tokenizer, "" if template is None else template.source)
        self.control_tokens = [*self._ids]
        self._control_ids = frozenset(self._ids.values())
        try:
            table = shadow_table(self._ids)
        except ValueError as error:
            raise BundleError(
                f"the control tokens of {tokenizer.origin} have {error}: pass sanitize=False, or build the bundle "
                "again with another tokenizer"
            ) from None
        self._letters = {shadow: letter for letter, shadow in table.items()}
        self._written = _written_forms(self._ids, table)
        # names that nobody can guess; their ends are those of the tokens, since a tokenizer may look at neighbours
        self._names = {text: f"{text[0]}{secrets.token_hex(16)}{text[-1]}" for text in self._ids}
        self._sharing = RenamedTokenizer(tokenizer, self._names, share_model=True)
        self._exact: RenamedTokenizer | None = None  # made when it is needed first, since it takes time and memory
        if template is not None:
            self._check_template(template)

    def encode_rendered(self, marked: str) -> list[int]:
        """Return the token ids of a rendered conversation.

        Args:
            marked: The text, as `ChatTemplate.render_marked` returns it for `control_tokens`.

        Raises:
            PromptError: The text is not valid Unicode, or the tokenizer fails on it, or does not find the control
                tokens that the template has written.
            BundleError: The tokenizer cannot be copied with other names for its control tokens.
        """
        expected = [self._ids[self._plain(found[0])] for found in self._written.finditer(marked)]
        named = self._plain(self._written.sub(lambda found: self._names[self._plain(found[0])], marked))
        ids = self._sharing.encode(named, add_special_tokens=False)
        if self._control_tokens_of(ids) == expected:
            return ids
        exact = self._exact_tokenizer()
        ids = exact.encode(named, add_special_tokens=False)
        if self._control_tokens_of(ids, exact.unknown) != [token for token in expected if token != exact.unknown]:
            raise PromptError(
                "a control token that the chat template writes is not one next to this text, so it cannot be told from "
                "those in messages; change the text, or pass sanitize=False"
            )
        return ids

    def encode_raw(self, text: str) -> list[int]:
        """Return the token ids of a user's text, with the tokenizer's own special tokens; raises as above."""
        is_exact = not self._control_tokens_of(self._sharing.encode(text, add_special_tokens=False))
        tokenizer = self._sharing if is_exact else self._exact_tokenizer()
        return tokenizer.encode(text, add_special_tokens=True)

    def _check_template(self, template: ChatTemplate) -> None:
        """Raise BundleError if the template composes control tokens in a way in which they are not recognised."""
        for messages in (_CONVERSATION, _CONVERSATION[:1]):
            try:
                text = template.render(messages)
                marked = template.render_marked(messages, control_tokens=self.control_tokens)
            except PromptError:
                continue
            if self.encode_rendered(marked) != self._tokenizer.encode(text, add_special_tokens=False):
                raise BundleError(
                    f"the chat template composes control tokens of {self._tokenizer.origin} from parts that are not "
                    "recognised, so they cannot be told from those in messages; expected them in one piece: pass "
                    "sanitize=False, or build the bundle with another --chat-template"
                )
            return

    def _control_tokens_of(self, ids: list[int], unknown: int | None = None) -> list[int]:
        return [token for token in ids if token in self._control_ids and token != unknown]

    def _exact_tokenizer(self) -> RenamedTokenizer:
        if self._exact is None:  # without a lock, which a fork would leave locked; at worst two threads make one each
            self._exact = RenamedTokenizer(self._tokenizer, self._names, share_model=False)
        return self._exact

    def _plain(self, marked: str) -> str:
        return marked.translate(self._letters)


def _written_forms(ids: dict[str, int], table: dict[int, int]) -> re.Pattern[str]:
    """Return a pattern of the forms in which a template writes control tokens: all of a token in shadows, or a role."""
    forms = {}
    for text in ids:
        forms[text.translate(table)] = len(text)
        for role in _ROLES:
            head, found, tail = text.partition(role)
            if found and head and tail:
                forms[head.translate(table) + role + tail.translate(table)] = len(text)
    return re.compile("|".join(map(re.escape, sorted(forms, key=lambda form: -forms[form]))) or "(?!)")
