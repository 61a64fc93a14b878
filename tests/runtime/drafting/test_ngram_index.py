"""The latest earlier occurrence of the last tokens, against a search of the whole text."""

import numpy as np
from medusa_runtime.drafting.ngram_index import MAX_MATCH, SIZES, Match, NgramIndex


def searched(tokens):
    """The latest earlier occurrence by its definition."""
    end = len(tokens)
    for size in SIZES:
        for position in range(end - 1, size - 1, -1):
            if size <= end and tokens[position - size : position] == tokens[end - size :]:
                length = size
                while length < min(MAX_MATCH, position) and tokens[position - length - 1] == tokens[end - length - 1]:
                    length += 1
                return Match(position, length)
    return None


def test_matches_are_those_of_a_search():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(rng.integers(1, 12), size=120).tolist()
        if seed % 3 == 0:
            tokens[60:90] = tokens[10:40]
        first = int(rng.integers(0, 30))
        index = NgramIndex(tokens[:first])
        found = 0
        while len(index) < len(tokens):
            assert index.match() == searched(tokens[: len(index)])
            found += index.match() is not None
            index.extend(tokens[len(index) : len(index) + int(rng.integers(1, 6))])
        assert found > 0 or seed % 3 == 1 or first > 20


def test_a_copied_text_is_continued():
    text = list(range(50))
    index = NgramIndex([*text, 99, *text[10:15]])
    match = index.match()
    assert match == Match(15, 5)
    assert index.continuation(match.position, 4) == [15, 16, 17, 18]
    index = NgramIndex([1, 2, 1, 2])
    assert index.match() == Match(2, 2) and index.continuation(2, 9) == [1, 2]


def test_the_latest_occurrence_wins_and_the_longer_ngram_before_the_shorter():
    assert NgramIndex([1, 2, 7, 1, 2, 8, 1, 2]).match() == Match(5, 2)
    assert NgramIndex([5, 1, 2, 7, 1, 2, 8, 5, 1, 2]).match() == Match(3, 3)


def test_there_is_no_match_in_little_text():
    for tokens in ([], [1], [1, 1], [1, 2, 3, 4]):
        assert NgramIndex(tokens).match() is None
    assert NgramIndex([1, 1, 1]).match() == Match(2, 2)


def test_a_long_match_is_not_measured_to_its_end():
    text = list(range(100))
    assert NgramIndex([*text, *text]).match() == Match(100, MAX_MATCH)
