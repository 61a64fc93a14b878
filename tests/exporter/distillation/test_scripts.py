import numpy as np
import pytest
from medusa_exporter.distillation import scripts
from medusa_exporter.distillation.scripts import (
    ANSWER,
    USER,
    USER_TEMPERATURE,
    USER_TOKENS,
    GeneratedRow,
    Request,
    ScriptSettings,
)
from medusa_exporter.distillation.template_parts import EndTokens, split_template
from medusa_exporter.prompts import prompt_ids

ASK = "\n<|im_start|>user\n"
REPLY = "\n<|im_start|>assistant\n"


def terms(tokenizer, *, follow_ups=True, context=100):
    return ScriptSettings(context, 12, split_template(tokenizer, (1,)), follow_ups)


def described(tokenizer, script):
    return [(tokenizer.decode(part.forced), part.kind, part.temperature, part.limit) for part in script]


def test_a_prompt_s_turns_are_given_and_then_the_model_writes_its_own(tokenizer):
    (script,) = scripts.make_scripts(tokenizer, [Request(("hi", "and?"), 0.7)], terms(tokenizer))
    found = described(tokenizer, script)
    assert found[:4] == [
        ("<|im_start|>user\nhi<|im_end|>" + REPLY, ANSWER, 0.7, 12),
        (ASK + "and?<|im_end|>" + REPLY, ANSWER, 0.7, 12),
        (ASK, USER, USER_TEMPERATURE, USER_TOKENS),
        (REPLY, ANSWER, 0.7, 12),
    ]
    assert found[4:] == found[2:4] * ((len(found) - 4) // 2)
    assert sum(len(part.forced) + 1 for part in script) >= 100  # enough for answers of one token


def test_a_synthesised_stream_opens_with_a_turn_of_the_model_s(tokenizer):
    first, second = scripts.make_scripts(tokenizer, [Request((), 0.0), Request(("hi",), 0.0)], terms(tokenizer))
    assert described(tokenizer, first)[:2] == [
        ("<|im_start|>user\n", USER, USER_TEMPERATURE, USER_TOKENS),
        (REPLY, ANSWER, 0.0, 12),
    ]
    assert first[2:] == second[1:]


def test_without_follow_ups_a_script_ends_with_what_was_asked(tokenizer):
    batch = [Request((), 0.0), Request(("a", "b"), 0.0)]
    made = scripts.make_scripts(tokenizer, batch, terms(tokenizer, follow_ups=False))
    assert [[part.kind for part in script] for script in made] == [[USER, ANSWER], [ANSWER, ANSWER]]


def test_without_a_frame_only_the_first_turn_is_answered(tokenizer):
    (script,) = scripts.make_scripts(tokenizer, [Request(("a", "b"), 0.0)], ScriptSettings(100, 12, None, True))
    assert [part.forced.tolist() for part in script] == prompt_ids(tokenizer, [[{"role": "user", "content": "a"}]])


def test_streams_are_shuffled_by_the_seed():
    found = scripts.shuffle_requests([("a",), ("b",)], 5, (0.0, 0.8), seed=3)
    expected = [Request((turn,), temperature) for turn in "ab" for temperature in (0.0, 0.8)]
    expected += [Request((), temperature) for temperature in (0.0, 0.8, 0.0, 0.8, 0.0)]

    def key(stream):
        return stream.turns, stream.temperature

    assert sorted(found, key=key) == sorted(expected, key=key)
    assert found == scripts.shuffle_requests([("a",), ("b",)], 5, (0.0, 0.8), seed=3)
    assert found != scripts.shuffle_requests([("a",), ("b",)], 5, (0.0, 0.8), seed=4)


def test_prompts_without_room_for_an_answer_are_left_out(tokenizer):
    (ids,) = prompt_ids(tokenizer, [[{"role": "user", "content": "abc"}]])
    assert scripts.drop_long_prompts(tokenizer, [("abc", "x" * 99), ("abcd",)], len(ids)) == [("abc", "x" * 99)]


@pytest.mark.parametrize(("roles", "length"), [([0, 2, 2, 0, 1], 3), ([0, 2], 2), ([0, 1, 1], 0), ([], 0)])
def test_lines_are_cut_after_the_last_answer(roles, length):
    line = GeneratedRow(np.arange(len(roles)), np.array(roles, np.uint8)).to_last_answer()
    assert line.tokens.tolist() == list(range(length))
    assert line.roles.tolist() == roles[:length]


def test_each_kind_has_its_end():
    ends = EndTokens((1,), user=3, answer=4)
    assert [scripts.end_token_of(kind, ends) for kind in (0, USER, ANSWER)] == [None, 3, 4]
