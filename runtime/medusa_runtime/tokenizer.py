"""Tokenisation: text to token ids and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import tokenizers

from medusa_runtime.errors import BundleError, MedusaError, PromptError


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

    @cached_property
    def has_byte_fallback(self) -> bool:
        """Whether the vocabulary has single bytes ("<0x0A>") for text without a token, as SentencePiece's may have."""
        with _translated(BundleError, f"the vocabulary of {self._origin} cannot be read"):
            found = [self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(0x80, 0x100)]
        return any(token is not None and self.decode([token]) == "\ufffd" for token in found)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; ids without a token are skipped.

        Args:
            ids: The token ids.
            skip_special_tokens: Leave special tokens out of the text.

        Raises:
            BundleError: The library fails on them.
        """
        with _translated(BundleError, f"tokens cannot be turned into text by the tokenizer of {self._origin}"):
            text: str = self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int, *, skip_special_tokens: bool = True) -> str:
        """Return a token as the vocabulary writes it; "" for ids that texts leave out.

        Args:
            token_id: The token id.
            skip_special_tokens: Return "" for special tokens too, and not only for ids without a token.

        Raises:
            BundleError: The library fails on it.
        """
        with _translated(BundleError, f"token {token_id} is not one of the tokenizer of {self._origin}"):
            is_left_out = skip_special_tokens and token_id in self._special
            shown: str | None = None if is_left_out else self._tokenizer.id_to_token(token_id)
        return shown or ""


@contextmanager
def _translated(kind: type[MedusaError], what: str) -> Iterator[None]:
    """Convert errors of the library to `kind`: Exception, and panics of its Rust code, which are BaseException."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime":
            raise kind(f"{what}: {error}; build the bundle again, or give another prompt") from None
        raise
