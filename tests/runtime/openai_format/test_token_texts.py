"""The texts and bytes of single tokens, with tokenizers of every common kind."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from medusa_runtime.detokenizer import IncrementalDetokenizer
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
    unigram_with_bytes,
    without_decoder,
    word_piece,
)


@pytest.mark.parametrize("kind", [byte_level, metaspace, *WITH_BYTES], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("sentence", [*SENTENCES, "</s>The dog", "<|end|>The"])
@pytest.mark.parametrize("skip", [True, False])
def test_the_bytes_of_a_texts_tokens_are_the_texts(kind, sentence, skip) -> None:
    tokenizer = one_of_kind(kind)
    read = TokenTexts(tokenizer)
    ids = tokenizer.encode(sentence, add_special_tokens=False)
    shown = [bool(tokenizer.token(token, skip_special_tokens=skip)) for token in ids]
    places = read.places(ids, skip_special_tokens=skip)
    pieces = [read(token, is_first=place.is_first)[1] for token, place in zip(ids, places, strict=True)]
    joined = b"".join(piece for piece, is_shown in zip(pieces, shown, strict=True) if is_shown)
    assert joined.decode() == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", [byte_level, metaspace, *WITH_BYTES], ids=lambda kind: kind.__name__)
@given(ids=st.lists(st.integers(0, 299), max_size=8), skip=st.booleans())
@settings(max_examples=200, deadline=None)
def test_places_are_in_the_text(kind, ids, skip) -> None:
    tokenizer = one_of_kind(kind)
    read = TokenTexts(tokenizer)
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    text = detokenizer.push(ids) + detokenizer.flush()
    places = read.places(ids, skip_special_tokens=skip)
    offsets = [place.offset for place in places]
    assert offsets == sorted(offsets)
    assert all(0 <= offset <= len(text) for offset in offsets)
    for token, place in zip(ids, places, strict=True):
        piece, data = read(token, is_first=place.is_first)
        if tokenizer.token(token, skip_special_tokens=skip) and data == piece.encode():
            at = text[place.offset :].lstrip("\ufffd")  # parts of characters that the token has ended
            assert at.startswith(piece.lstrip("\ufffd"))


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


@pytest.mark.parametrize(
    ("kind", "token", "text"),
    [
        (byte_level, "Ġ", " "),
        (metaspace, "▁The", "The"),
        (metaspace, "▁▁", ""),
        (byte_fallback, "▁The", "The"),
        (byte_fallback, "<0x20>", ""),
        (unigram_with_bytes, "▁a", " a"),
        (word_piece, "dog", "dog"),
    ],
)
def test_first_tokens(kind, token, text) -> None:
    tokenizer = one_of_kind(kind)
    assert TokenTexts(tokenizer)(id_of(tokenizer, token), is_first=True) == (text, text.encode())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_id_has_a_text(kind) -> None:
    tokenizer = one_of_kind(kind)
    read = TokenTexts(tokenizer)
    for token in range(320):  # and ids without a token
        text, data = read(token)
        assert data.decode(errors="replace") == text
        assert read(token) == (text, data)
    assert read(100_000) == ("", b"")
