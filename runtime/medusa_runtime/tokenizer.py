"""Text to token ids and back, whole or as it grows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import tokenizers

from medusa_runtime.errors import BundleError, MedusaError, PromptError

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or none yet

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # one byte, in SentencePiece vocabularies with byte fallback
_CONTEXT = 8  # tokens; 4 are needed, since a character has at most 4 bytes and a token at least one


class Tokenizer:
    """A tokenizer of the `tokenizers` library, its truncation and padding switched off.

    data: the bytes of a tokenizer.json. origin: names the place in errors. Raises BundleError for other bytes.
    """

    def __init__(self, data: bytes, origin: str) -> None:
        self._origin = origin
        with _translated(BundleError, f"{origin} is not a tokenizer that tokenizers {tokenizers.__version__} reads"):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, facts in added.items() if facts.special)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token, as the vocabulary writes it."""
        with _translated(BundleError, f"the vocabulary of {self._origin} cannot be read"):
            return max(map(len, self._tokenizer.get_vocab()), default=0)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the text's token ids; `add_special_tokens` adds what the tokenizer puts around a text (BOS, say).

        Raises PromptError for text that is not valid Unicode (a lone surrogate) or that the library gives up on.
        """
        try:
            text.encode()  # the library itself calls such a text no str
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt is not valid Unicode: {error}") from None
        with _translated(PromptError, f"the prompt cannot be tokenised by the tokenizer of {self._origin}"):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens and ids without a token left out.

        Raises BundleError where the library gives up.
        """
        with _translated(BundleError, f"tokens cannot be turned into text by the tokenizer of {self._origin}"):
            text: str = self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)
        return text

    def token(self, token_id: int) -> str:
        """Return how the vocabulary writes a token that shows in text; "" for a special or unknown one."""
        with _translated(BundleError, f"token {token_id} is not one of the tokenizer of {self._origin}"):
            shown: str | None = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        return shown or ""


class IncrementalDetokenizer:
    """Text that grows by tokens. All pieces joined are `Tokenizer.decode` of all ids.

    What a few tokens add is the difference between the text of a short context with them and without. The context may
    begin in the middle of a character: that spoils its first characters only, and in both texts alike.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the last tokens whose text was given out, but for an unfinished character
        self._waiting: list[int] = []  # byte tokens: whether they are characters shows when their run ends

    def push(self, ids: Sequence[int]) -> str:
        """Take more ids; return the text that no later id can change. Costs time by len(ids), whatever came before."""
        shown = [(int(token), text) for token in ids if (text := self._tokenizer.token(int(token)))]
        settled = max((at for at, (_, text) in enumerate(shown, start=1) if not _BYTE_TOKEN.fullmatch(text)), default=0)
        tokens = [token for token, _ in shown]
        if not settled:
            self._waiting += tokens
            return ""
        window = [*self._context, *self._waiting, *tokens[:settled]]
        piece = _certain(self._tokenizer.decode(window))[len(_certain(self._tokenizer.decode(self._context))) :]
        self._context = window[-_CONTEXT:]
        self._waiting = tokens[settled:]
        return piece

    def flush(self) -> str:
        """Return the rest: bytes that stayed incomplete become U+FFFD. The stream then begins anew."""
        text = self._tokenizer.decode([*self._context, *self._waiting])
        piece = text[len(_certain(self._tokenizer.decode(self._context))) :]
        self._context, self._waiting = [], []
        return piece


@contextmanager
def _translated(kind: type[MedusaError], what: str) -> Iterator[None]:
    """Turn whatever the library raises into `kind`: bare Exception, and panics of its Rust, which are none of that."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime":
            raise kind(f"{what}: {error}; build the bundle again, or give another prompt") from None
        raise


def _certain(text: str) -> str:
    """Drop the last character if it stands for bytes that may yet become another one."""
    return text[:-1] if text.endswith(REPLACEMENT) else text
