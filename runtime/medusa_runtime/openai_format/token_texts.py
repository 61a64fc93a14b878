"""The text and the bytes of single tokens, as log-probabilities in OpenAI's form show them."""

from __future__ import annotations

import re
from functools import lru_cache

from medusa_runtime.detokenizer import REPLACEMENT
from medusa_runtime.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CACHED = 1 << 14  # tokens


class TokenTexts:
    """Returns the texts and bytes of tokens; several threads may use it at once.

    Args:
        tokenizer: The bundle's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._read = lru_cache(_CACHED)(self._read_token)

    def __call__(self, token_id: int) -> tuple[str, bytes]:
        """Return the text that a token has behind other tokens, and its bytes in UTF-8.

        A token that is a part of a character has U+FFFD in its text; its bytes are the part's, so that the bytes of an
        answer's tokens, joined, are those of its text.

        Raises:
            BundleError: The tokenizer's library fails on the token.
        """
        return self._read(token_id)

    def _read_token(self, token_id: int) -> tuple[str, bytes]:
        alone = self._tokenizer.decode([token_id], skip_special_tokens=False)
        if REPLACEMENT in alone:
            return alone, self._read_bytes(token_id, alone)
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
