"""The text and the bytes of single tokens, as log-probabilities in OpenAI's form show them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from medusa_runtime.detokenizer import REPLACEMENT, IncrementalDetokenizer
from medusa_runtime.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CACHED = 1 << 14  # tokens


class TokenPlace(NamedTuple):
    """Where a token stands in an answer.

    Attributes:
        offset: Number of characters of the answer's text that earlier tokens have completed.
        is_first: Whether no earlier token is part of the text.
    """

    offset: int
    is_first: bool


class TokenTexts:
    """Returns the texts and bytes of tokens; several threads may use it at once.

    Args:
        tokenizer: The bundle's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._read = lru_cache(_CACHED)(self._read_token)

    def __call__(self, token_id: int, *, is_first: bool = False) -> tuple[str, bytes]:
        """Return the text of a token, and its bytes in UTF-8.

        A token that is a part of a character has U+FFFD in its text; its bytes are the part's. So the bytes of a text's
        tokens, joined, are those of the text, if the tokenizer is byte-level, or one of SentencePiece's kinds. Other
        decoders may change a token for the sake of its neighbours, as WordPiece's does with punctuation.

        Args:
            token_id: The token.
            is_first: Read the token as the first one of a text (`TokenPlace.is_first`), where decoders like Llama 2's
                drop the space that it begins with.

        Raises:
            BundleError: The tokenizer's library fails on the token.
        """
        return self._read(token_id, is_first)

    def places(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> list[TokenPlace]:
        """Return where each token of an answer stands.

        Args:
            token_ids: All tokens of the answer.
            skip_special_tokens: Whether the answer's text leaves special tokens out, as `SamplingParams` says.

        Raises:
            BundleError: The tokenizer's library fails on the tokens.
        """
        detokenizer = IncrementalDetokenizer(self._tokenizer, skip_special_tokens=skip_special_tokens)
        found, offset, is_first = [], 0, True
        for token_id in token_ids:
            found.append(TokenPlace(offset, is_first))
            offset += len(detokenizer.push([token_id]))
            is_first = is_first and not self._tokenizer.token(token_id, skip_special_tokens=skip_special_tokens)
        return found

    def _read_token(self, token_id: int, is_first: bool) -> tuple[str, bytes]:
        alone = self._tokenizer.decode([token_id], skip_special_tokens=False)
        if REPLACEMENT in alone:
            return alone, self._read_bytes(token_id, alone)
        if is_first:
            return alone, alone.encode()
        # Some decoders drop the space that a text begins with, so the token is read behind itself.
        twice = self._tokenizer.decode([token_id, token_id], skip_special_tokens=False)
        text = twice[len(alone) :] if twice.startswith(alone) else alone
        return text, text.encode()

    def _read_bytes(self, token_id: int, text: str) -> bytes:
        """Return the bytes of a token whose text has U+FFFD, the text's own if the token cannot be read as bytes."""
        token = self._tokenizer.token(token_id, skip_special_tokens=False)
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        if all(character in _BYTE_OF for character in token):
            data = bytes(_BYTE_OF[character] for character in token)
            if data.decode(errors="replace") == text:
                return data
        return text.encode()


def _byte_characters() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Bytes that are printable characters of Latin-1 stand for themselves; the others are characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
