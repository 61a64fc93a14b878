import json

import numpy as np
import pytest
from medusa_exporter.distillation import review
from medusa_exporter.distillation.conversations import Conversation, conversation_rows
from medusa_exporter.distillation.dataset import DataError, DataFacts, from_rows, group_of
from medusa_exporter.distillation.template_parts import encode
from medusa_runtime.errors import PromptError

EOS = (1,)
FIRST = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
LATER = "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = {"role": "system", "content": "be brief"}


def row(tokenizer, *pieces):
    """A row of given and written pieces in turn."""
    ids = [encode(tokenizer, piece) for piece in pieces]
    marks = np.repeat(np.arange(len(ids)) % 2 == 1, [len(part) for part in ids])
    return np.concatenate(ids), marks, 0.0, group_of(pieces[0])


def said(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


@pytest.fixture
def made(tokenizer):
    """Rows of every kind: one answer, several, one broken off, one never ended, a ready one, a foreign one."""
    ready = Conversation((SYSTEM, *said("who", "me")), "f:1")
    rows = [
        row(tokenizer, FIRST.format("hi"), "yes<|im_end|>"),
        row(tokenizer, FIRST.format("a"), "b<|im_end|>", LATER.format(" c\n"), "d<|im_end|>"),
        row(tokenizer, FIRST.format("a"), "cut", "<|im_end|>" + LATER.format("go on"), "open"),
        *conversation_rows(tokenizer, [ready], 200, EOS),
        row(tokenizer, "nothing of the kind", "x"),
    ]
    return from_rows(DataFacts("m", "d", 256, EOS, 0, {"context": 200}), rows)


MESSAGES = {
    0: said("hi", "yes"),
    1: said("a", "b", " c\n", "d"),
    2: said("a", "cut", "go on", "open"),
    3: [SYSTEM, *said("who", "me")],
}


def write(path, lines):
    path.write_text("".join(json.dumps({"id": number, "messages": said}) + "\n" for number, said in lines.items()))
    return path


def same_rows(left, right):
    return left.rows == right.rows and all(
        np.array_equal(a, b) for n in range(left.rows) for a, b in zip(left.row(n), right.row(n), strict=True)
    )


def test_what_is_written_out_is_the_conversations(made, tokenizer, tmp_path):
    assert review.write_review(made, tokenizer, tmp_path / "out") == (4, 1)
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert {line["id"]: line["messages"] for line in lines} == MESSAGES


def test_lines_left_alone_change_nothing(made, tokenizer, tmp_path):
    review.write_review(made, tokenizer, tmp_path / "out")
    back, counts = review.read_review(made, tokenizer, tmp_path / "out", 200)
    assert counts == {"unchanged": 5, "changed": 0, "dropped": 0}
    assert same_rows(back, made)
    np.testing.assert_array_equal(back.temperature, made.temperature)
    np.testing.assert_array_equal(back.groups, made.groups)
    assert back.facts != made.facts
    assert review.without_review(back.facts) == made.facts


def test_changed_lines_are_laid_out_anew_and_missing_ones_dropped(made, tokenizer, tmp_path):
    lines = {0: said("hi", "yes, indeed"), 2: MESSAGES[2], 3: [*MESSAGES[3], *said("more", "no")]}
    back, counts = review.read_review(made, tokenizer, write(tmp_path / "in", lines), 200)
    assert counts == {"unchanged": 2, "changed": 2, "dropped": 1}
    assert tokenizer.decode(back.row(0)[0]) == FIRST.format("hi") + "yes, indeed<|im_end|>"
    assert np.isnan(back.temperature[[0, 2]]).all()
    assert back.temperature[1] == 0
    kept = np.array([False, False, True, False, True])
    assert same_rows(back.select(np.array([False, True, False, True])), made.select(kept))
    again = tmp_path / "again"
    review.write_review(back, tokenizer, again)
    assert [json.loads(line)["messages"] for line in again.read_text().splitlines()] == list(lines.values())


def test_the_same_corrections_are_not_taken_in_twice(made, tokenizer, tmp_path):
    path = write(tmp_path / "in", {0: MESSAGES[0]})
    back, _ = review.read_review(made, tokenizer, path, 200)
    with pytest.raises(DataError, match="in the data already"):
        review.read_review(back, tokenizer, path, 200)


@pytest.mark.parametrize("number", [5, -1, "0", None, True, 1.0])
def test_an_id_that_is_no_row_is_named(made, tokenizer, tmp_path, number):
    path = tmp_path / "in"
    path.write_text(json.dumps({"id": number, "messages": MESSAGES[0]}))
    with pytest.raises(PromptError, match=r"in:1: 'id' is .* 0 to 4"):
        review.read_review(made, tokenizer, path, 200)


def test_bad_lines_are_named(made, tokenizer, tmp_path):
    path = tmp_path / "in"
    line = json.dumps({"id": 0, "messages": MESSAGES[0]})
    path.write_text(f"{line}\n{line}\n")
    with pytest.raises(PromptError, match=r"in:2: 'id' 0 is on .*in:1 too"):
        review.read_review(made, tokenizer, path, 200)
    write(path, {0: MESSAGES[0], 1: said("too long " * 50, "no")})
    with pytest.raises(PromptError, match="in:2: no answer within 200 tokens"):
        review.read_review(made, tokenizer, path, 200)


def test_corrections_that_leave_nothing_are_refused(made, tokenizer, tmp_path):
    (tmp_path / "in").write_text("")
    with pytest.raises(DataError, match="no row is left"):
        review.read_review(made.select(np.arange(5) < 4), tokenizer, tmp_path / "in", 200)


def test_a_template_without_system_messages_can_be_read(made, template):
    own = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    reader = review.ConversationReader(template(own), EOS)
    assert list(reader.messages(*made.row(1))) == MESSAGES[1]
    assert reader.messages(*made.row(3)) is None
    with pytest.raises(PromptError, match="in their order"):
        review.ConversationReader(template("deaf"), EOS)
