"""Tokenisation: text to token ids and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import tokenizers

from medusa_runtime.errors import BundleError, MedusaError, PromptError


class Tokenizer:
    """A tokenizer of the `tokenizers` library with truncation and padding disabled.

    Args:
        data: Bytes of a `tokenizer.json`.
        origin: Names the file in error messages.

    Attributes:
        origin: The same.
        added_tokens: The library's description of each token that is found in a text before the model divides it.

    Raises:
        BundleError: The bytes are not a tokenizer that the library reads.
    """

    def __init__(self, data: bytes, origin: str) -> None:
        self.origin = origin
        with translate_errors(
            BundleError, f"{origin} is not a tokenizer that tokenizers {tokenizers.__version__} reads"
        ):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, facts in added.items() if facts.special)
        self.added_tokens: dict[int, Any] = dict(sorted(added.items()))

    @property
    def core(self) -> Any:
        """The library's tokenizer, which several threads use at once and nobody may change."""
        return self._tokenizer

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token in the vocabulary."""
        with translate_errors(BundleError, f"the vocabulary of {self.origin} cannot be read"):
            return max(map(len, self._tokenizer.get_vocab()), default=0)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: The text.
            add_special_tokens: Whether to add the tokenizer's own special tokens, such as BOS. Those in front are not
                added to a text that begins with them.

        Raises:
            PromptError: The text is not valid Unicode (a lone surrogate), or the library fails on it.
        """
        check_unicode(text)
        with translate_errors(PromptError, f"the prompt cannot be tokenised by the tokenizer of {self.origin}"):
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
            ids: list[int] = encoding.ids
            mask: list[int] = encoding.special_tokens_mask if add_special_tokens else [0]
        added = mask.index(0) if 0 in mask else 0  # number of tokens added in front
        return ids[added:] if added and ids[added : 2 * added] == ids[:added] else ids

    @cached_property
    def has_byte_fallback(self) -> bool:
        """Whether the vocabulary has single bytes ("<0x0A>") for text without a token, as SentencePiece's may have."""
        with translate_errors(BundleError, f"the vocabulary of {self.origin} cannot be read"):
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
        with translate_errors(BundleError, f"tokens cannot be turned into text by the tokenizer of {self.origin}"):
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
        with translate_errors(BundleError, f"token {token_id} is not one of the tokenizer of {self.origin}"):
            is_left_out = skip_special_tokens and token_id in self._special
            shown: str | None = None if is_left_out else self._tokenizer.id_to_token(token_id)
        return shown or ""


def check_unicode(text: str) -> None:
    """Raise PromptError for a text with a lone surrogate, for which the library reports a misleading TypeError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"the prompt is not valid Unicode: {error}; remove lone surrogates") from None


@contextmanager
def translate_errors(kind: type[MedusaError], what: str) -> Iterator[None]:
    """Convert errors of the library to `kind`: Exception, and panics of its Rust code, which are BaseException."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime":
            raise kind(f"{what}: {error}; build the bundle again, or give another prompt") from None
        raise
