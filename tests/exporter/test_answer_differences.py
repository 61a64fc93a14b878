"""Where two answers first differ, how far apart the two tokens are, and what counts as a tie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from medusa_exporter.answer_differences import AnswerDifference, compare_answers, first_difference, next_logits
from medusa_exporter.bench.timing import generate_timed
from medusa_runtime.backends.base import PREFILL_CHUNK
from medusa_runtime.loading import LoadedBundle, load_bundle


@pytest.fixture(scope="module")
def loaded(tiny_bundle: Path) -> LoadedBundle:
    return load_bundle(tiny_bundle, profile="plain", threads=1)


def reader(**logits: float):
    """Logits of a vocabulary of ten, all 0 but those named, and the ids asked for."""
    asked: list[list[int]] = []

    def read(ids: list[int]) -> np.ndarray:
        asked.append(ids)
        row = np.zeros(10, np.float32)
        for name, value in logits.items():
            row[int(name[1:])] = value
        return row

    read.asked = asked  # type: ignore[attr-defined]
    return read


@pytest.mark.parametrize(
    ("expected", "got", "where"),
    [
        ([], [], None),
        ([1, 2], [1, 2], None),
        ([1, 2], [3, 2], 0),
        ([1, 2, 3], [1, 2, 4], 2),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2], 2),
        ([], [1], 0),
        ((1, 2), [1, 2], None),
    ],
)
def test_the_first_difference(expected: list[int], got: list[int], where: int | None) -> None:
    assert first_difference(expected, got) == where


def test_equal_answers_cost_no_run() -> None:
    read = reader()
    assert compare_answers([1], [2, 3], (2, 3), read) is None
    assert read.asked == []


@pytest.mark.parametrize(("share", "fails"), [(0.0, False), (0.0099, False), (0.0101, True), (None, True)])
def test_a_tie_of_quantised_products_is_a_share_of_the_rows_range(share: float | None, fails: bool) -> None:
    assert AnswerDifference(0, 1, 2, 0.3, share, exact=False).fails is fails


def test_the_share_is_the_gap_over_the_rows_range() -> None:
    found = compare_answers([7], [3], [4], reader(t3=1.0, t4=0.5, t9=-3.0), exact=False)
    assert found is not None
    assert (found.gap, found.share, found.exact) == (pytest.approx(0.5), pytest.approx(0.125), False)


def test_the_gap_is_read_behind_the_prompt_and_the_common_tokens() -> None:
    read = reader(t3=2.0, t4=1.5)
    assert compare_answers([7, 8], [1, 2, 3], [1, 2, 4, 5], read) == AnswerDifference(2, 3, 4, pytest.approx(0.5))
    assert read.asked == [[7, 8, 1, 2]]


def test_two_near_tokens_far_below_the_likeliest_are_no_tie() -> None:
    found = compare_answers([7], [3], [4], reader(t3=1.0, t4=1.0, t9=6.0))
    assert found is not None
    assert found.gap == pytest.approx(5.0)
    assert found.fails


def test_the_widest_of_several_gaps_counts() -> None:
    found = compare_answers([7], [3], [4], reader(t3=1.0, t4=1.0), reader(t3=1.0, t4=0.8))
    assert found is not None
    assert found.gap == pytest.approx(0.2)


@pytest.mark.parametrize(("gap", "fails"), [(0.0, False), (1e-3, False), (1.1e-3, True), (None, True)])
def test_only_a_tie_in_float_is_forgiven(gap: float | None, fails: bool) -> None:
    assert AnswerDifference(0, 1, 2, gap).fails is fails


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_never_a_tie(value: float) -> None:
    found = compare_answers([7], [3], [4], reader(t3=1.0, t4=value))
    assert found is not None
    assert found.gap is None
    assert found.fails


def test_an_answer_that_ended_early_fails() -> None:
    assert compare_answers([7], [3, 4], [3], reader()) == AnswerDifference(1, 4, None, None)
    assert compare_answers([7], [3], [3, 4], reader()) == AnswerDifference(1, None, 4, None)


def test_a_difference_is_told_with_position_tokens_and_gap(loaded: LoadedBundle) -> None:
    tokenizer = loaded.tokenizer
    tree, end = tokenizer.encode("tree", add_special_tokens=False)[-1], loaded.bundle.model.eos_token_ids[0]
    text = AnswerDifference(5, tree, end, 0.25).describe(tokenizer)
    for part in (
        "token 5",
        f"{tree} {tokenizer.decode([tree])!r}",
        f"{end} (a special token)",
        "2.50e-01",
        "not a tie",
    ):
        assert part in text
    assert "a tie in float" in AnswerDifference(5, 3, 4, 2e-5).describe(tokenizer)
    assert "no token" in AnswerDifference(5, None, 4, None).describe(tokenizer)


def test_the_reader_gives_the_logits_that_plain_decoding_chose_by(loaded: LoadedBundle) -> None:
    ids = loaded.prompt_encoder.encode("word " * 60)
    assert len(ids) > PREFILL_CHUNK
    answer = generate_timed(loaded.decoder, ids, 6).tokens
    read = next_logits(loaded.decoder)
    for position, token in enumerate(answer):
        assert int(read([*ids, *answer[:position]]).argmax()) == token
