"""What was written where little is open is guessed there again, and nothing of the content is."""

import pytest
from medusa_runtime.structured.habits import MAX_KEY, Habits

from .constrained import adapter
from .schemas import json_tokenizer


@pytest.fixture
def habits():
    return Habits(adapter())


def ids(*texts):
    found = [json_tokenizer().encode(text, add_special_tokens=False) for text in texts]
    assert all(len(one) == 1 for one in found)
    return [one[0] for one in found]


def test_without_a_habit_characters_are_tokens_of_their_own(habits):
    quote, letter, colon = ids('"', "a", ":")
    assert habits.guess(b'"', letter) == quote and habits.guess(b":", None) == colon
    assert habits.guess(b"", letter) is None and habits.guess(b"", None) is None


def test_what_was_chosen_at_the_same_characters_is_guessed(habits):
    letter, quote, colon = ids("a", '"', '":')
    habits.learn(b'"', letter, colon)
    assert habits.guess(b'"', None) == colon
    long = b"x" * MAX_KEY
    habits.learn(long + b"1", None, letter)
    assert habits.guess(long + b"2", None) == letter
    habits.learn(b'"', letter, quote)
    assert habits.guess(b'"', letter) == quote


def test_where_nothing_is_forced_only_the_layout_is_remembered(habits):
    comma, line, letter, brace = ids(",", "\n", "a", "{")
    habits.learn(b"", comma, line)
    habits.learn(b"", line, letter)
    habits.learn(b"", letter, comma)
    habits.learn(b"", None, brace)
    assert habits.guess(b"", comma) == line
    assert habits.guess(b"", line) is None and habits.guess(b"", letter) is None and habits.guess(b"", None) is None
