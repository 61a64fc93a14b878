import numpy as np
import pytest
from medusa_exporter.distillation import streams
from medusa_exporter.distillation.frame import Ends, cut_frame
from medusa_exporter.distillation.streams import ANSWER, USER, USER_TEMPERATURE, USER_TOKENS, Line, Stream, Terms
from medusa_exporter.prompts import lay_out

ASK = "\n<|im_start|>user\n"
REPLY = "\n<|im_start|>assistant\n"


def terms(tokenizer, *, follow_ups=True, context=100):
    return Terms(context, 12, cut_frame(tokenizer, (1,)), follow_ups)


def described(tokenizer, script):
    return [(tokenizer.decode(part.given), part.kind, part.temperature, part.limit) for part in script]


def test_a_prompt_s_turns_are_given_and_then_the_model_writes_its_own(tokenizer):
    (script,) = streams.make_scripts(tokenizer, [Stream(("hi", "and?"), 0.7)], terms(tokenizer))
    found = described(tokenizer, script)
    assert found[:4] == [
        ("<|im_start|>user\nhi<|im_end|>" + REPLY, ANSWER, 0.7, 12),
        (ASK + "and?<|im_end|>" + REPLY, ANSWER, 0.7, 12),
        (ASK, USER, USER_TEMPERATURE, USER_TOKENS),
        (REPLY, ANSWER, 0.7, 12),
    ]
    assert found[4:] == found[2:4] * ((len(found) - 4) // 2)
    assert sum(len(part.given) + 1 for part in script) >= 100  # enough for answers of one token


def test_a_synthesised_stream_opens_with_a_turn_of_the_model_s(tokenizer):
    first, second = streams.make_scripts(tokenizer, [Stream((), 0.0), Stream(("hi",), 0.0)], terms(tokenizer))
    assert described(tokenizer, first)[:2] == [
        ("<|im_start|>user\n", USER, USER_TEMPERATURE, USER_TOKENS),
        (REPLY, ANSWER, 0.0, 12),
    ]
    assert first[2:] == second[1:]


def test_without_follow_ups_a_script_ends_with_what_was_asked(tokenizer):
    wave = [Stream((), 0.0), Stream(("a", "b"), 0.0)]
    scripts = streams.make_scripts(tokenizer, wave, terms(tokenizer, follow_ups=False))
    assert [[part.kind for part in script] for script in scripts] == [[USER, ANSWER], [ANSWER, ANSWER]]


def test_without_a_frame_only_the_first_turn_is_answered(tokenizer):
    (script,) = streams.make_scripts(tokenizer, [Stream(("a", "b"), 0.0)], Terms(100, 12, None, True))
    assert [part.given.tolist() for part in script] == lay_out(tokenizer, [[{"role": "user", "content": "a"}]])


def test_streams_are_shuffled_by_the_seed():
    found = streams.shuffled([("a",), ("b",)], 5, (0.0, 0.8), seed=3)
    expected = [Stream((turn,), temperature) for turn in "ab" for temperature in (0.0, 0.8)]
    expected += [Stream((), temperature) for temperature in (0.0, 0.8, 0.0, 0.8, 0.0)]

    def key(stream):
        return stream.turns, stream.temperature

    assert sorted(found, key=key) == sorted(expected, key=key)
    assert found == streams.shuffled([("a",), ("b",)], 5, (0.0, 0.8), seed=3)
    assert found != streams.shuffled([("a",), ("b",)], 5, (0.0, 0.8), seed=4)


def test_prompts_without_room_for_an_answer_are_left_out(tokenizer):
    (ids,) = lay_out(tokenizer, [[{"role": "user", "content": "abc"}]])
    assert streams.fits(tokenizer, [("abc", "x" * 99), ("abcd",)], len(ids)) == [("abc", "x" * 99)]


@pytest.mark.parametrize(("roles", "length"), [([0, 2, 2, 0, 1], 3), ([0, 2], 2), ([0, 1, 1], 0), ([], 0)])
def test_lines_are_cut_after_the_last_answer(roles, length):
    line = Line(np.arange(len(roles)), np.array(roles, np.uint8)).to_last_answer()
    assert line.tokens.tolist() == list(range(length))
    assert line.roles.tolist() == roles[:length]


def test_each_kind_has_its_end():
    ends = Ends((1,), user=3, answer=4)
    assert [streams.end_of(kind, ends) for kind in (0, USER, ANSWER)] == [None, 3, 4]
