import json

import numpy as np
import pytest
from medusa_exporter.distillation import conversations
from medusa_exporter.distillation.dataset import group_of
from medusa_runtime.errors import PromptError

TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]
SYSTEM = {"role": "system", "content": "be brief"}


def written(path, *lines):
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def read(tmp_path, *lines):
    return conversations.read_conversations(written(tmp_path / "c.jsonl", *lines))


def test_conversations_are_read_with_where_they_stand(tmp_path):
    first, second = read(tmp_path, {"messages": TALK, "id": 3}, {"messages": [SYSTEM | {"name": "x"}, *TALK]})
    assert first.messages == tuple(TALK)
    assert first.turns == ("hi", "bye")
    assert (first.identity, second.identity) == (3, None)
    assert second.messages == (SYSTEM, *TALK)
    assert second.where.endswith("c.jsonl:2")


@pytest.mark.parametrize(
    "messages",
    [
        "hi",
        [],
        [SYSTEM],
        ["hi"],
        [*TALK, SYSTEM],
        [SYSTEM, SYSTEM, *TALK],
        TALK[:3],
        TALK[1:],
        [*TALK[:2], *TALK[:1], *TALK[:1]],
        [{"role": "tool", "content": "hi"}, TALK[1]],
        [{"role": "user", "content": 3}, TALK[1]],
        [{"role": "user", "content": " "}, TALK[1]],
        [{"role": "user"}, TALK[1]],
        [{"role": ["user"], "content": "a"}, TALK[1]],
    ],
)
def test_a_bad_line_is_named(tmp_path, messages):
    with pytest.raises(PromptError, match=r"c\.jsonl:2: .*(expected|must)"):
        read(tmp_path, {"messages": TALK}, {"messages": messages})


def rows(tokenizer, messages, context=200, eos=(1,)):
    ready = [conversations.Conversation(tuple(messages), "c.jsonl:1")]
    return conversations.conversation_rows(tokenizer, ready, context, eos)


def marked(tokenizer, row):
    tokens, marks, *_ = row
    pieces = np.split(tokens, np.flatnonzero(np.diff(marks)) + 1)
    return [tokenizer.decode(piece) for piece in pieces]


def test_answers_are_marked_with_their_ends(tokenizer):
    (row,) = rows(tokenizer, TALK)
    assert marked(tokenizer, row) == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "hello<|im_end|>",
        "\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n",
        "so long<|im_end|>",
    ]
    assert row[1][-1]
    assert np.isnan(row[2])
    assert row[3] == group_of("hi")


def test_an_end_that_is_no_eos_is_not_the_answer_s(tokenizer):
    (row,) = rows(tokenizer, TALK, eos=(0,))
    assert marked(tokenizer, row)[1] == "hello"


def test_a_system_message_is_laid_out_and_space_around_an_answer_kept(tokenizer):
    (row,) = rows(tokenizer, [SYSTEM, TALK[0], {"role": "assistant", "content": " hello \n"}])
    first, answer = marked(tokenizer, row)
    assert first.startswith("<|im_start|>system\nbe brief<|im_end|>")
    assert answer == " hello \n<|im_end|>"


def test_conversations_are_cut_at_the_context(tokenizer):
    whole = rows(tokenizer, TALK)[0]
    for context in (len(whole[0]) - 3, len(whole[0]) // 2):
        (row,) = rows(tokenizer, TALK, context=context)
        np.testing.assert_array_equal(row[0], whole[0][: len(row[0])])
        np.testing.assert_array_equal(row[1], whole[1][: len(row[1])])
        assert row[1][-1]
        assert len(row[0]) <= context
    assert rows(tokenizer, TALK, context=10) == []


def test_space_that_the_template_takes_away_is_not_missed(template):
    trimming = template(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
    )
    (row,) = rows(trimming, [TALK[0], {"role": "assistant", "content": " hello \n"}])
    assert marked(trimming, row)[1] == "hello<|im_end|>"


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}{{ m['content'].upper() }}{% endfor %}",
        "{% for m in messages %}{{ loop.length ~ m['content'] }}{% endfor %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_that_rewrites_answers_is_refused_by_line(template, text):
    with pytest.raises(PromptError, match=r"^c\.jsonl:1: .*template"):
        rows(template(text), TALK)
