"""The texts and bytes of single tokens, with tokenizers of every common kind."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from medusa_runtime.openai_format import TokenTexts

from ..small_tokenizers import (
    KINDS,
    SENTENCES,
    WITH_BYTES,
    byte_fallback,
    byte_level,
    id_of,
    metaspace,
    one_of_kind,
    without_decoder,
    word_piece,
)


@pytest.mark.parametrize("kind", [byte_level, *WITH_BYTES], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("sentence", SENTENCES)
def test_the_bytes_of_a_texts_tokens_are_the_texts(kind, sentence) -> None:
    tokenizer = one_of_kind(kind)
    read = TokenTexts(tokenizer)
    ids = tokenizer.encode(sentence, add_special_tokens=False)
    joined = b"".join(read(token)[1] for token in ids).decode()
    expected = tokenizer.decode(ids, skip_special_tokens=False)
    assert joined in (expected, f" {expected}")  # some decoders drop the space in front


@given(ids=st.lists(st.integers(0, 299), max_size=8))
@settings(max_examples=300, deadline=None)
def test_any_bytes_of_a_byte_level_vocabulary(ids) -> None:
    tokenizer = one_of_kind(byte_level)
    read = TokenTexts(tokenizer)
    joined = b"".join(read(token)[1] for token in ids)
    assert joined.decode(errors="replace") == tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("kind", "token", "text", "data"),
    [
        (byte_level, "Ġ", " ", b" "),
        (byte_level, "Ã", "\ufffd", b"\xc3"),
        (byte_level, "<|end|>", "<|end|>", b"<|end|>"),
        (metaspace, "▁The", " The", b" The"),
        (byte_fallback, "▁The", " The", b" The"),
        (byte_fallback, "<0x0A>", "\n", b"\n"),
        (byte_fallback, "<0xE4>", "\ufffd", b"\xe4"),
        (byte_fallback, "\ufffd", "\ufffd", "\ufffd".encode()),
        (byte_fallback, "</s>", "</s>", b"</s>"),
        (word_piece, "##ab", "ab", b"ab"),
        (word_piece, "dog", " dog", b" dog"),
        (without_decoder, "<0xE4>", " <0xE4>", b" <0xE4>"),
    ],
)
def test_tokens(kind, token, text, data) -> None:
    tokenizer = one_of_kind(kind)
    assert TokenTexts(tokenizer)(id_of(tokenizer, token)) == (text, data)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_id_has_a_text(kind) -> None:
    tokenizer = one_of_kind(kind)
    read = TokenTexts(tokenizer)
    for token in range(320):  # and ids without a token
        text, data = read(token)
        assert data.decode(errors="replace") == text
        assert read(token) == (text, data)
    assert read(100_000) == ("", b"")
