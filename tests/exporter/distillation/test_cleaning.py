import numpy as np
import pytest
from medusa_exporter.distillation.cleaning import clean_rows, user_spans
from medusa_exporter.distillation.dataset import group_of
from medusa_exporter.distillation.scripts import ANSWER, FORCED, USER, GeneratedRow, Request


def line(*pieces):
    """A written row of (role, text), a token a character; an end token, '.', closes a user turn."""
    text = "".join(text for _, text in pieces)
    roles = [role for role, text in pieces for _ in text]
    return GeneratedRow(np.frombuffer(text.encode(), np.uint8).astype(np.int64), np.array(roles, np.uint8))


def decode(parts):
    return [bytes(part.astype(np.uint8)).decode().removesuffix(".") for part in parts]


def cleaned(*rows, refused=(), openings=()):
    streams = [Request((), 0.5) if given is None else Request((given,), 0.0) for given, _ in rows]
    found = clean_rows(streams, [line(*pieces) for _, pieces in rows], decode, set(refused), set(openings))
    for _, marks, _, _ in found:
        assert marks[-1]
    return [(decode([tokens])[0], marks, temperature, group) for tokens, marks, temperature, group in found]


OPENED = (FORCED, "<")
ANSWERED = (ANSWER, "yes.")


def test_what_follows_the_last_answer_is_cut():
    ((text, marks, temperature, group),) = cleaned(("hi", [(FORCED, "hi>"), ANSWERED, OPENED, (USER, "more."), OPENED]))
    assert text == "hi>yes"  # less the end, which decode takes off
    assert marks.tolist() == [False] * 3 + [True] * 4
    assert temperature == 0.0
    assert group == group_of("hi")


def test_all_answers_are_marked_and_the_turns_between_are_not():
    pieces = [(FORCED, "hi>"), ANSWERED, OPENED, (USER, "more."), (FORCED, ">"), (ANSWER, "no")]
    ((text, marks, _, _),) = cleaned(("hi", pieces))
    assert text == "hi>yes.<more.>no"
    assert "".join("x" if mark else "-" for mark in marks) == "---xxxx" + "-" * 7 + "xx"


@pytest.mark.parametrize(
    ("turn", "kept"),
    [("fine.", True), (".", False), (" ?!.", False), ("Forbidden!.", False), ("forbidden fruit.", True)],
)
def test_a_row_ends_before_an_empty_or_excluded_turn(turn, kept):
    pieces = [(FORCED, "hi>"), ANSWERED, OPENED, (USER, turn), (FORCED, ">"), ANSWERED]
    ((text, _, _, _),) = cleaned(("hi", pieces), refused=["forbidden"])
    assert text == (f"hi>yes.<{turn}>yes" if kept else "hi>yes")


def test_an_opening_of_the_model_s_must_be_new():
    def opened(text):
        return None, [OPENED, (USER, text), (FORCED, ">"), ANSWERED]

    rows = cleaned(opened("One."), opened("one!"), opened("two"), opened("Two?."), opened("."), openings=["two"])
    assert [text for text, *_ in rows] == ["<One.>yes"]
    assert rows[0][2:] == (0.5, group_of("One"))


def test_a_later_turn_may_be_said_again():
    pieces = [(FORCED, "hi>"), ANSWERED, OPENED, (USER, "again."), (FORCED, ">"), ANSWERED]
    assert len(cleaned(("hi", pieces), ("ho", pieces), openings=["again"])) == 2
    assert all("again" in text for text, *_ in cleaned(("hi", pieces), ("ho", pieces), openings=["again"]))


def test_openings_are_remembered_from_wave_to_wave():
    openings = set()
    pieces = line(OPENED, (USER, "new."), (FORCED, ">"), ANSWERED)
    assert [len(clean_rows([Request((), 0.0)], [pieces], decode, set(), openings)) for _ in range(2)] == [1, 0]


def test_a_row_without_an_answer_is_dropped():
    assert cleaned(("hi", [(FORCED, "hi>")]), (None, [OPENED, (USER, "new.")])) == []


def test_user_spans():
    assert user_spans(np.array([USER, USER, ANSWER, USER, FORCED, USER])) == [(0, 2), (3, 4), (5, 6)]
    assert user_spans(np.array([], np.uint8)) == []
