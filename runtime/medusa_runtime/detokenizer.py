"""Incremental detokenisation: token ids to text while an answer grows."""

from __future__ import annotations

import codecs
import copy
import re
from collections.abc import Sequence

from medusa_runtime.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what the text has for bytes that are not (yet) a character

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # one byte, in SentencePiece vocabularies with byte fallback
_CONTEXT = 8  # tokens; 4 are needed, since a character has at most 4 bytes and a token at least one
_LONGEST_CONTEXT = 24  # tokens; between the two, the text of the context is known and need not be decoded again


class IncrementalDetokenizer:
    """Turns a growing list of token ids into pieces of text, each as soon as no later token can change it.

    The pieces do not depend on how the tokens are divided into calls. Joined, they equal `Tokenizer.decode` of all ids,
    with one exception: where tokens that are single bytes ("<0x0A>", byte fallback) follow each other and are not valid
    UTF-8 as a whole, the library replaces all of them by U+FFFD, the valid characters too. Here each character is
    returned when its last byte arrives, and only bytes that are part of none become U+FFFD.

    The text of new tokens is the difference between the texts of a few preceding tokens with and without them. These
    may begin in the middle of a character, which garbles the first characters of both texts in the same way.

    Args:
        tokenizer: Decodes the tokens.
        skip_special_tokens: Leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._has_byte_fallback = tokenizer.has_byte_fallback
        self._reset()

    def _reset(self) -> None:
        self._context: list[int] = []  # the last tokens, which may end with an incomplete character
        self._returned: int | None = 0  # characters of the context's text that were returned; None is not known
        self._bytes = b""  # of an incomplete character, from the last tokens of the context

    def copy(self) -> IncrementalDetokenizer:
        """Return a detokenizer in the same state, which then continues independently."""
        return copy.copy(self)  # all state is replaced, never changed in place

    def push(self, ids: Sequence[int]) -> str:
        """Add token ids and return the text that no later id can change; the time depends on len(ids) only.

        Raises:
            BundleError: The library fails on them.
        """
        shown = [
            (int(token), text)
            for token in ids
            if (text := self._tokenizer.token(int(token), skip_special_tokens=self._skip_special_tokens))
        ]
        if not self._has_byte_fallback:
            return self._push_texts([token for token, _ in shown])
        pieces: list[str] = []
        texts: list[int] = []  # tokens since the last byte token
        for token, text in shown:
            if byte := _BYTE_TOKEN.fullmatch(text):
                pieces += (self._push_texts(texts), self._push_byte(token, int(byte[1], 16)))
                texts = []
            else:
                texts.append(token)
        return "".join([*pieces, self._push_texts(texts)])

    def flush(self) -> str:
        """Return the remaining text, with U+FFFD for incomplete characters, and reset."""
        piece = self._end_character()
        if not self._has_byte_fallback:
            piece += self._text(self._context)[self._returned :]
        self._reset()
        return piece

    def _push_texts(self, tokens: list[int]) -> str:
        """Add tokens that are not single bytes."""
        if not tokens:
            return ""
        piece = self._end_character()
        if self._returned is None or len(self._context) > _LONGEST_CONTEXT:
            self._context = self._context[-_CONTEXT:]
            self._returned = len(self._certain_text(self._context))
        self._context = [*self._context, *tokens]
        text = self._certain_text(self._context)
        piece += text[self._returned :]
        self._returned = len(text)
        return piece

    def _push_byte(self, token: int, byte: int) -> str:
        """Add a token that is a single byte, and return the character that it completes."""
        first = len(self._context) == len(self._bytes)
        self._context = [*self._context[-_CONTEXT:], token]
        self._returned = None
        self._bytes += bytes([byte])
        piece, self._bytes = _complete_characters(self._bytes)
        if first and piece and REPLACEMENT not in piece:
            return self._text(self._context)  # some decoders drop a space that a text begins with
        return piece

    def _end_character(self) -> str:
        """Return U+FFFD for each byte of an incomplete character, which nothing can complete any more."""
        piece = REPLACEMENT * len(self._bytes)
        self._bytes = b""
        return piece

    def _certain_text(self, ids: list[int]) -> str:
        """Return the text of tokens without the last character if it stands for bytes that later ones may complete."""
        text = self._text(ids)
        return text[:-1] if text.endswith(REPLACEMENT) and not self._has_byte_fallback else text

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)


def _complete_characters(data: bytes) -> tuple[str, bytes]:
    """Return the text of bytes, a U+FFFD for each invalid one, and the bytes of an incomplete character at its end."""
    text = ""
    while True:
        try:
            rest, used = codecs.utf_8_decode(data, "strict", False)
        except UnicodeDecodeError as error:
            text += data[: error.start].decode() + REPLACEMENT * (error.end - error.start)
            data = data[error.end :]
        else:
            return text + rest, data[used:]
