"""Growing answers with stop strings: the same end and the same text, however their tokens arrive."""

import itertools
import random
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from medusa_runtime.errors import ArgumentError, BundleError, MedusaError
from medusa_runtime.text_stream import StopMatch, StopStrings, TextStream

from .small_tokenizers import (
    KINDS,
    REPLACEMENT,
    byte_fallback,
    byte_level,
    id_of,
    one_of_kind,
    text_of,
    unigram_with_bytes,
    word_piece,
)

SMILE = "\U0001f642"
STORIES = ["aaab aab\n\n\n\nbaab", "The dog. The dog,\nthe dog?", f"a{SMILE}{SMILE}b 你你\n", "aaaaaaaaaaaaaaab"]


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def read(tokenizer, parts, stop=(), *, stop_token=False, **options):
    """Push parts one after the other; return the pieces, the match, and the number of tokens up to the end."""
    stream, taken, count, match = TextStream(tokenizer, stop, **options), [], 0, None
    for at, part in enumerate(parts, start=1):
        match = stream.push(part, ends_with_stop_token=stop_token and at == len(parts))
        taken.append(stream.take())
        count += match.tokens if match else len(part)
        if match:
            break
    stream.finish()
    taken.append(stream.take())
    assert stream.text == "".join(taken)
    assert stream.take() == ""
    return taken, match and match.string, count


def by_prefixes(tokenizer, ids, stop, *, include_stop, skip_special_tokens, min_tokens):
    """Return text, stop string and number of tokens by decoding every prefix anew: the slow reference."""
    border = 0
    for count in range(1, len(ids) + 1):
        text = text_of(tokenizer, ids[:count], final=False, skip_special_tokens=skip_special_tokens)
        if count <= min_tokens:
            border = len(text)
            continue
        for end in range(border + 1, len(text) + 1):
            for string in stop:
                if text[:end].endswith(string):
                    return text[:end] if include_stop else text[: end - len(string)], string, count
    return text_of(tokenizer, ids, final=True, skip_special_tokens=skip_special_tokens), None, len(ids)


def withheld(text, stop):
    """Return the number of characters at the end of a text with which a stop string begins, and goes on."""
    for start in range(len(text)):
        if any(len(string) > len(text) - start and string.startswith(text[start:]) for string in stop):
            return len(text) - start
    return 0


@st.composite
def answers(draw, kind):
    """Draw tokens, stop strings that are likely to occur in their text, a division into pushes, and options."""
    tokenizer = one_of_kind(kind)
    any_ids = st.lists(st.integers(0, 310), max_size=30)
    stories = st.lists(st.sampled_from(STORIES), min_size=1, max_size=2)
    ids = draw(st.one_of(any_ids, stories.map(lambda parts: ids_of(tokenizer, "".join(parts)))))
    ids = ids[draw(st.integers(0, 3)) :] + draw(st.lists(st.integers(0, 310), max_size=3))
    skip = draw(st.booleans())
    text = text_of(tokenizer, ids, final=True, skip_special_tokens=skip) or "?"
    stop = []
    for _ in range(draw(st.integers(0, 4))):
        start, length = draw(st.integers(0, len(text) - 1)), draw(st.integers(1, 9))
        stop.append(text[start : start + length] + draw(st.sampled_from(["", "", "", "a", "\n"])))
    stop += draw(st.lists(st.sampled_from(["\n\n", "aab", "ab", "aaaa", "b", REPLACEMENT, " "]), max_size=2))
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=len(ids))))
    bounds = [0, *cuts, len(ids)]
    parts = [ids[at:end] for at, end in itertools.pairwise(bounds)]
    options = {
        "include_stop": draw(st.booleans()),
        "skip_special_tokens": skip,
        "min_tokens": draw(st.sampled_from([0, 0, 1, 2, 5, 40])),
    }
    return ids, parts, stop, options


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_division_ends_where_single_tokens_do(kind, data):
    tokenizer = one_of_kind(kind)
    ids, parts, stop, options = data.draw(answers(kind))
    text, string, count = by_prefixes(tokenizer, ids, stop, **options)
    for division in (parts, [ids], [[token] for token in ids]):
        taken, got, tokens = read(tokenizer, division, stop, **options)
        assert ("".join(taken), got, tokens) == (text, string, count)
        pushed = 0
        for at, part in enumerate(division[: len(taken) - 1], start=1):
            pushed += len(part)
            if pushed < count or (pushed == count and string is None):
                skip = options["skip_special_tokens"]
                known = text_of(tokenizer, ids[:pushed], final=False, skip_special_tokens=skip)
                assert "".join(taken[:at]) == known[: len(known) - withheld(known, stop)], "no more, and no less"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    text=st.text("ab", max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    stop=st.lists(st.text("ab", min_size=1, max_size=12), min_size=1, max_size=5),
)
@example(text="aaab", cuts=[3], stop=["aab"])
@example(text="abab", cuts=[], stop=["abab", "b"])
@example(text="abab", cuts=[], stop=["bab", "abab"])
def test_strings_that_overlap_themselves_and_each_other(text, cuts, stop):
    """Against every end of every beginning; strings of more than 8 characters share their last ones with others."""
    strings = StopStrings(stop)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    expected = next(
        ((string, end) for end in range(1, len(text) + 1) for string in stop if text[:end].endswith(string)), None
    )
    cut = 0
    for start, end in itertools.pairwise(bounds):
        found = strings.find(text[cut:end], start - cut)
        if found is not None:
            assert (found[0], found[1] + cut) == expected
            return
        cut += strings.find_open_end(text[cut:end])
        assert end - cut == withheld(text[:end], stop)
    assert expected is None


@pytest.mark.parametrize("include_stop", [False, True])
def test_the_text_ends_at_the_stop_string(include_stop):
    tokenizer = one_of_kind(byte_level)
    ids = ids_of(tokenizer, "The dog sleeps.")
    assert [tokenizer.decode([token]) for token in ids[:2]] == ["The", " dog"]
    taken, string, count = read(tokenizer, [ids], ["he d"], include_stop=include_stop)
    assert ("".join(taken), string, count) == ("The d" if include_stop else "T", "he d", 2)


def test_one_token_may_complete_several_stop_strings():
    """The one that is complete first wins, then the first in the list; where a string begins does not matter."""
    tokenizer = one_of_kind(word_piece)
    ids = [id_of(tokenizer, word) for word in ("the", "dog", "do not", "the")]
    for stop, expected in (
        (["og", "dog", "g"], "og"),
        (["dog", "og"], "dog"),
        (["the dog", "do"], "do"),
        ([" don't", "on'", "don"], "don"),
        (["dog do", "o"], "o"),
    ):
        for parts in ([ids], [ids[:1], ids[1:]], [[token] for token in ids]):
            assert read(tokenizer, parts, stop)[1] == expected


def test_a_stop_string_may_end_within_a_token_and_begin_in_an_earlier_push():
    tokenizer = one_of_kind(byte_fallback)
    ids = [id_of(tokenizer, word) for word in ("▁The", "▁dog", "s", "▁", "<0x0A>", "▁dog")]
    stream = TextStream(tokenizer, ["gs \n d"])
    assert stream.push(ids[:2]) is None and stream.take() == "The do"
    assert stream.push(ids[2:4]) is None and stream.take() == ""
    assert stream.text == "The do", "what is withheld may still go"
    assert stream.push(ids[4:]) == StopMatch("gs \n d", 2) and stream.take() == ""
    stream.finish()
    assert stream.text == "The do" and stream.take() == ""


def test_withheld_text_comes_when_it_cannot_become_a_stop_string():
    tokenizer = one_of_kind(byte_level)
    ids = ids_of(tokenizer, "aab\n\naac")
    taken, string, _ = read(tokenizer, [[token] for token in ids], ["aab\n\naab", "ba"])
    assert string is None
    assert taken == ["", "", "", "", "", "", "", "aab\n\naac", ""]


@pytest.mark.parametrize("kind", [byte_fallback, unigram_with_bytes])
def test_a_newline_that_is_a_byte_token_ends_the_answer_at_once(kind):
    tokenizer = one_of_kind(kind)
    ids = [id_of(tokenizer, word) for word in ("a", "<0x0A>", "<0xFF>", "b")]
    for parts in ([ids], [ids[:3], ids[3:]], [[token] for token in ids]):
        taken, string, count = read(tokenizer, parts, ["\n"])
        assert ("".join(taken), string, count) == ("a", "\n", 2)


def test_incomplete_characters_do_not_complete_a_stop_string():
    tokenizer = one_of_kind(byte_level)
    ids = ids_of(tokenizer, f"a{SMILE}")
    taken, string, count = read(tokenizer, [[token] for token in ids[:-1]], [REPLACEMENT])
    assert taken == ["a", "", "", "", REPLACEMENT] and string is None and count == len(ids) - 1
    assert read(tokenizer, [ids], [SMILE])[1:] == (SMILE, len(ids))
    assert read(tokenizer, [ids[:3]], [f"a{SMILE}"])[0] == ["", f"a{REPLACEMENT}"]
    assert read(tokenizer, [[*ids[:3], 1]], stop_token=True)[0] == ["a", REPLACEMENT]


def test_stop_strings_do_not_end_the_first_tokens():
    tokenizer = one_of_kind(byte_level)
    ids = ids_of(tokenizer, "xyxyx")
    assert len(ids) == 5
    for min_tokens, text, count in [(0, "x", 3), (2, "x", 3), (3, "xyx", 5), (4, "xyx", 5), (5, "xyxyx", 5)]:
        for parts in ([ids], [ids[:2], ids[2:]], [[token] for token in ids]):
            got = read(tokenizer, parts, ["yx"], min_tokens=min_tokens)
            assert ("".join(got[0]), got[2]) == (text, count), "one that lies in the first tokens is never found"
    special = [1, 1, *ids]
    assert read(tokenizer, [special], ["yx"], min_tokens=5)[2] == 7, "special tokens count"


def test_a_stop_token_may_be_a_word_and_is_not_searched_unless_it_is_text():
    tokenizer = one_of_kind(word_piece)
    ids = [id_of(tokenizer, word) for word in ("the", "dog")]
    assert read(tokenizer, [ids], stop_token=True) == (["the", ""], None, 2)
    assert read(tokenizer, [ids[:1], ids[1:]], stop_token=True) == (["the", "", ""], None, 2)
    assert read(tokenizer, [ids], stop_token=True, include_stop=True) == (["the dog", ""], None, 2)
    assert read(tokenizer, [ids], [" dog", "e x"], stop_token=True) == (["th", "e"], None, 2)
    assert read(tokenizer, [ids], [" dog"], stop_token=True, include_stop=True) == (["the dog", ""], " dog", 2)
    assert read(tokenizer, [ids], ["h"], stop_token=True) == (["t", ""], "h", 1), "a stop string before it wins"


def test_special_tokens_are_text_on_request():
    tokenizer = one_of_kind(byte_level)
    ids = [0, *ids_of(tokenizer, "a"), 1, *ids_of(tokenizer, "b"), 1]
    assert "".join(read(tokenizer, [ids])[0]) == "ab"
    assert "".join(read(tokenizer, [ids], skip_special_tokens=False)[0]) == "<|start|>a<|end|>b<|end|>"
    taken, string, count = read(tokenizer, [ids], ["|end"], skip_special_tokens=False)
    assert ("".join(taken), string, count) == ("<|start|>a<", "|end", 3)
    assert "".join(read(tokenizer, [ids], stop_token=True, skip_special_tokens=False)[0]) == "<|start|>a<|end|>b"


def test_a_text_without_tokens_and_a_finished_one_that_takes_none():
    tokenizer = one_of_kind(byte_level)
    ids = ids_of(tokenizer, "ab")
    ended, stopped = TextStream(tokenizer), TextStream(tokenizer, ["a"])
    ended.finish()
    stopped.push(ids)
    for stream in (ended, stopped):
        with pytest.raises(MedusaError, match="2 tokens were added to a finished text; expected none"):
            stream.push(ids)
        stream.finish()
        assert stream.text == ""
    assert read(tokenizer, [[], []], ["a"]) == (["", "", ""], None, 0)
    assert read(tokenizer, [[]]) == (["", ""], None, 0)


@pytest.mark.parametrize("stop", [[""], ["a", ""], "ab"])
def test_stop_strings_are_a_list_of_texts(stop):
    with pytest.raises(ArgumentError, match="expected a list of texts that are not empty"):
        TextStream(one_of_kind(byte_level), stop)


def test_characters_that_mean_something_in_patterns():
    tokenizer = one_of_kind(byte_level)
    for string in ["]", "^", "-", "\\", "[a-z]", "a]", "^b", "&&", "||", "~~", "--", ".", "\ud800"]:
        stop = [string, "]x", "\\x"]
        assert read(tokenizer, [ids_of(tokenizer, "Abc")], stop)[1] is None
        if string.isascii():
            assert read(tokenizer, [ids_of(tokenizer, f"12{string}34")], stop)[:2] == (["12", ""], string)


def test_an_error_of_the_library(monkeypatch):
    tokenizer = byte_level()
    stream = TextStream(tokenizer, ["a"])
    monkeypatch.setattr(tokenizer, "_tokenizer", None)
    with pytest.raises(BundleError, match=r"byte_level\.json"):
        stream.push([5])


def test_many_long_stop_strings_cost_little():
    """256 of 1,024 characters, the first of which the text keeps repeating: compared with no stop strings."""
    tokenizer = one_of_kind(byte_level)
    rng = random.Random(0)
    stop = ["a" * 1000 + "".join(rng.choice("ab") for _ in range(23)) + "c" for _ in range(256)]
    ids = ids_of(tokenizer, "aaaaaaaaab" * 300 + "a" * 1500)

    def seconds(stop):
        best = float("inf")
        for _ in range(3):
            stream = TextStream(tokenizer, stop)
            started = time.perf_counter()
            for at in range(0, len(ids), 3):
                assert stream.push(ids[at : at + 3]) is None
                stream.take()
            best = min(best, time.perf_counter() - started)
            stream.finish()
            assert len(stream.text) == 4500
        return best

    assert seconds(stop) < 10 * seconds([]) + 0.1
