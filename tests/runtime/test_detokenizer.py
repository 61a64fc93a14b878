"""Text that grows by tokens: nothing lost, doubled or split, for every kind of tokenizer."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from medusa_runtime.detokenizer import IncrementalDetokenizer
from medusa_runtime.errors import BundleError

from .small_tokenizers import (
    KINDS,
    REPLACEMENT,
    SENTENCES,
    WITH_BYTES,
    byte_fallback,
    byte_level,
    id_of,
    metaspace,
    one_of_kind,
    text_of,
    unigram_with_bytes,
    word_ends,
    word_piece,
)

SMILE = "\U0001f642"
kinds = pytest.mark.parametrize("kind", KINDS)
sizes = st.lists(st.integers(0, 7), max_size=40)


def pieces(tokenizer, ids, size, **options):
    stream = IncrementalDetokenizer(tokenizer, **options)
    return [*(stream.push(ids[at : at + size]) for at in range(0, len(ids), size)), stream.flush()]


def ids_of_bytes(tokenizer, data):
    return [id_of(tokenizer, f"<0x{byte:02X}>") for byte in data]


def ids_of_letters(tokenizer, data):
    """Return one token per byte of a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}
    return [id_of(tokenizer, letters[byte]) for byte in data]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("text", [*SENTENCES, " ".join(SENTENCES), "", "a"])
@kinds
def test_pieces_join_to_the_text(kind, text, size):
    tokenizer = one_of_kind(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids, size)) == tokenizer.decode(ids)


@kinds
@settings(max_examples=150, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, 310), max_size=60), sizes=sizes, skip=st.booleans())
@example(ids=[3 + 0x20, 3 + 0xFF, 3 + 0x20, 3 + 0x0A], sizes=[], skip=True)
@example(ids=[3 + 0xE4, 3 + 0xB8, 260, 3 + 0xF0, 1, 3 + 0x9F], sizes=[2, 2], skip=False)
def test_each_piece_is_the_text_that_its_tokens_complete(kind, ids, sizes, skip):
    """Against the texts of all tokens so far, decoded anew; what is left of `ids` is pushed token by token."""
    tokenizer = one_of_kind(kind)
    stream, returned, at = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip), "", 0
    while at < len(ids):
        size, sizes = (sizes[0], sizes[1:]) if sizes else (1, [])
        returned += stream.push(ids[at : at + size])
        at += size
        assert returned == text_of(tokenizer, ids[:at], final=False, skip_special_tokens=skip)
    assert returned + stream.flush() == text_of(tokenizer, ids, final=True, skip_special_tokens=skip)


@pytest.mark.parametrize("pattern", [b"\x80", b"\xe4\xb8\x80\xe4", b"\xb8\x80\xe4", b"\xf0\x9f", b"\x9f\x99\x82\xf0"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_repeated_straddling_and_invalid_bytes(pattern, size):
    tokenizer = one_of_kind(byte_level)
    ids = ids_of_letters(tokenizer, pattern * 40)
    got = pieces(tokenizer, ids, size)
    assert "".join(got) == tokenizer.decode(ids)
    assert max(len(piece) for piece in got) <= size + 3, "text piles up"


def test_a_character_comes_out_whole():
    tokenizer = one_of_kind(byte_level)
    ids = tokenizer.encode(f"{SMILE}!", add_special_tokens=False)
    assert len(ids) == 5
    assert pieces(tokenizer, ids, 1) == ["", "", "", SMILE, "!", ""]
    assert pieces(tokenizer, ids[:3], 1) == ["", "", "", REPLACEMENT]


def test_a_special_token_within_a_character():
    tokenizer = one_of_kind(byte_level)
    ids = tokenizer.encode(f"{SMILE}!", add_special_tokens=False)
    ids = [*ids[:2], 1, *ids[2:]]
    assert "".join(pieces(tokenizer, ids, 1)) == f"{SMILE}!"
    shown = pieces(tokenizer, ids, 1, skip_special_tokens=False)
    assert shown == ["", "", f"{REPLACEMENT}<|end|>", "", REPLACEMENT, f"{REPLACEMENT}!", ""]


@pytest.mark.parametrize("kind", WITH_BYTES)
def test_a_character_of_byte_tokens_comes_out_with_its_last_byte(kind):
    """Whole answers may be bytes: in vocabularies that lack a script, and a newline is one in Llama 2's."""
    tokenizer = one_of_kind(kind)
    ids = ids_of_bytes(tokenizer, "\n\u1780\u17b6\n".encode())
    assert pieces(tokenizer, ids, 1) == ["\n", "", "", "\u1780", "", "", "\u17b6", "\n", ""]


@pytest.mark.parametrize("kind", WITH_BYTES)
def test_invalid_bytes_do_not_take_valid_characters_with_them(kind):
    """The library replaces a whole run of bytes, and so all that an answer had when a limit cut its last character."""
    tokenizer = one_of_kind(kind)
    ids = ids_of_bytes(tokenizer, "\u1780\n".encode() + b"\xff" + SMILE.encode()[:2])
    assert tokenizer.decode(ids) == REPLACEMENT * 7
    for size in (1, 2, 7):
        assert "".join(pieces(tokenizer, ids, size)) == f"\u1780\n{REPLACEMENT * 3}"
    interrupted = [*ids[-2:], id_of(tokenizer, "a"), *ids[-2:]]
    assert "".join(pieces(tokenizer, interrupted, 1)) == tokenizer.decode(interrupted)


@pytest.mark.parametrize(
    "kind, words, expected",
    [
        (metaspace, ["▁The", "▁", "▁dog", "▁▁", "s"], ["The", " ", " dog", "  ", "s", ""]),
        (byte_fallback, ["▁The", "▁dog", "<0x20>", "s"], ["The", " dog", " ", "s", ""]),
        (byte_fallback, ["<0x20>", "▁dog"], ["", " dog", ""]),
        (unigram_with_bytes, ["▁a", "▁▁", "b"], [" a", "  ", "b", ""]),
        (word_piece, ["do", "n't", ".", "##s", "the", "do not"], ["do", "n't", ".", "s", " the", " don't", ""]),
        (word_ends, ["a", "b</w>", "a</w>", ".</w>"], ["a", "b", " a", " .", ""]),
    ],
)
def test_spaces_between_words(kind, words, expected):
    tokenizer = one_of_kind(kind)
    ids = [id_of(tokenizer, word) for word in words]
    assert pieces(tokenizer, ids, 1) == expected
    assert "".join(expected) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
def test_cost_of_a_push_does_not_grow(kind, monkeypatch):
    tokenizer = kind()
    counts, decode = [], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: counts.append(len(ids)) or decode(ids, **options))
    stream = IncrementalDetokenizer(tokenizer)
    for token in [0x80 + 5, 200, 10, 262, 3] * 300:
        before = len(counts)
        stream.push([token])
        assert sum(counts[before:]) <= 50
    assert len(counts) > 300


def test_a_finished_stream_begins_anew():
    tokenizer = one_of_kind(byte_level)
    ids = tokenizer.encode("The dog", add_special_tokens=False)
    stream = IncrementalDetokenizer(tokenizer)
    assert [stream.push(ids) + stream.flush() for _ in range(2)] == ["The dog"] * 2
    assert stream.push([]) == "" and stream.flush() == ""


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
def test_a_copy_continues_on_its_own(kind):
    tokenizer = one_of_kind(kind)
    ids = tokenizer.encode(f"a{SMILE}b{SMILE}", add_special_tokens=False)
    whole = tokenizer.decode(ids)
    for at in range(len(ids)):
        stream = IncrementalDetokenizer(tokenizer)
        before = stream.push(ids[:at])
        copy = stream.copy()
        assert before + "".join(copy.push([token]) for token in ids[at:]) == whole
        copy.flush()
        assert copy.push(ids) == whole, "begun anew"
        assert before + stream.push(ids[at:]) == whole, "what the copy did has changed nothing"


@pytest.mark.parametrize("ids", [[-1], [2**40]])
def test_ids_that_are_none(ids):
    with pytest.raises(BundleError, match="is not one of the tokenizer of"):
        IncrementalDetokenizer(one_of_kind(byte_level)).push(ids)
