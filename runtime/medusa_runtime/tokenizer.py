"""Tokenisation: text to token ids and back, also incrementally while an answer grows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import tokenizers

from medusa_runtime.errors import BundleError, MedusaError, PromptError

REPLACEMENT = "\ufffd"  # what the tokenizer writes for bytes that are not (yet) a character

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # one byte, in SentencePiece vocabularies with byte fallback
_CONTEXT = 8  # tokens; 4 are needed, since a character has at most 4 bytes and a token at least one


class Tokenizer:
    """A tokenizer of the `tokenizers` library with truncation and padding disabled.

    Args:
        data: Bytes of a `tokenizer.json`.
        origin: Names the file in error messages.

    Raises:
        BundleError: The bytes are not a tokenizer that the library reads.
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
        """Characters of the longest token in the vocabulary."""
        with _translated(BundleError, f"the vocabulary of {self._origin} cannot be read"):
            return max(map(len, self._tokenizer.get_vocab()), default=0)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: The text.
            add_special_tokens: Whether to add the tokenizer's own special tokens, such as BOS.

        Raises:
            PromptError: The text is not valid Unicode (a lone surrogate), or the library fails on it.
        """
        try:
            text.encode()  # the library reports a misleading TypeError for it
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt is not valid Unicode: {error}") from None
        with _translated(PromptError, f"the prompt cannot be tokenised by the tokenizer of {self._origin}"):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; special tokens and ids without a token are skipped.

        Raises:
            BundleError: The library fails on them.
        """
        with _translated(BundleError, f"tokens cannot be turned into text by the tokenizer of {self._origin}"):
            text: str = self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)
        return text

    def token(self, token_id: int) -> str:
        """Return a token as the vocabulary writes it; "" for special and unknown tokens, which texts leave out."""
        with _translated(BundleError, f"token {token_id} is not one of the tokenizer of {self._origin}"):
            shown: str | None = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        return shown or ""


class IncrementalDetokenizer:
    """Turns a growing list of token ids into pieces of text; joined, they equal `Tokenizer.decode` of all ids.

    The text of new tokens is the difference between the texts of a few preceding tokens with and without them. These
    may begin in the middle of a character, which garbles the first characters of both texts in the same way.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the last tokens whose text was returned, except an incomplete character
        self._waiting: list[int] = []  # byte tokens, which may be parts of a character until another token follows

    def push(self, ids: Sequence[int]) -> str:
        """Add token ids and return the text that no later id can change; the time depends on len(ids) only."""
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
        """Return the remaining text, with U+FFFD for incomplete characters, and reset."""
        text = self._tokenizer.decode([*self._context, *self._waiting])
        piece = text[len(_certain(self._tokenizer.decode(self._context))) :]
        self._context, self._waiting = [], []
        return piece


@contextmanager
def _translated(kind: type[MedusaError], what: str) -> Iterator[None]:
    """Convert errors of the library to `kind`: Exception, and panics of its Rust code, which are BaseException."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime":
            raise kind(f"{what}: {error}; build the bundle again, or give another prompt") from None
        raise


def _certain(text: str) -> str:
    """Drop the last character if it stands for bytes that later bytes may complete."""
    return text[:-1] if text.endswith(REPLACEMENT) else text
