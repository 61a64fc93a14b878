import pytest
from medusa_runtime.sequence import SequenceState

STOP = frozenset({9, 8})


def sequence(max_new_tokens=100, context=100):
    return SequenceState((9, 1, 2), max_new_tokens, STOP, context)


def test_a_new_sequence_ends_with_its_prompt():
    new = sequence()
    assert (new.length, new.last_token, new.answer, new.finish_reason) == (3, 2, [], None)


def test_stop_ids_in_the_prompt_do_not_count():
    new = sequence()
    assert new.extend([3]) == [3]
    assert new.finish_reason is None


def test_takes_everything_while_nothing_ends_it():
    new = sequence()
    assert new.extend([3, 4, 5]) == [3, 4, 5]
    assert new.extend([6]) == [6]
    assert (new.length, new.last_token, new.answer, new.finish_reason) == (7, 6, [3, 4, 5, 6], None)


@pytest.mark.parametrize(
    ("limits", "given", "taken", "finish"),
    [
        ({}, [3, 9, 4], [3, 9], "stop"),
        ({}, [8, 9], [8], "stop"),
        ({}, [3, 4, 9], [3, 4, 9], "stop"),
        ({"max_new_tokens": 2}, [3, 4, 5], [3, 4], "length"),
        ({"max_new_tokens": 2}, [3, 4], [3, 4], "length"),
        ({"max_new_tokens": 1}, [3], [3], "length"),
        ({"context": 5}, [3, 4, 5], [3, 4], "length"),
        ({"context": 4}, [3, 4, 5], [3], "length"),
        ({"max_new_tokens": 2, "context": 5}, [3, 9, 4], [3, 9], "stop"),  # said first of all that hold
        ({"max_new_tokens": 2, "context": 5}, [3, 4, 9], [3, 4], "length"),
    ],
)
def test_ends_where_plain_decoding_would(limits, given, taken, finish):
    at_once, one_by_one = sequence(**limits), sequence(**limits)
    assert at_once.extend(given) == taken
    for token in given:
        one_by_one.extend([token])
    assert at_once == one_by_one
    assert (at_once.answer, at_once.finish_reason) == (taken, finish)


def test_a_finished_sequence_takes_nothing_more():
    done = sequence()
    done.extend([9])
    assert done.extend([3]) == []
    assert (done.answer, done.finish_reason, done.last_token) == ([9], "stop", 9)
