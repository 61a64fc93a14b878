"""Speculation of peers that leave the loop to us."""

import pytest
from peers_runners import accepted, ngram_draft


@pytest.mark.parametrize(
    ("drafts", "chosen", "tokens"),
    [([], [4], [4]), ([4, 5], [4, 5, 6], [4, 5, 6]), ([4, 9], [4, 5, 6], [4, 5]), ([9, 5], [4, 5, 6], [4])],
)
def test_drafts_are_accepted_up_to_the_first_difference(
    drafts: list[int], chosen: list[int], tokens: list[int]
) -> None:
    assert accepted(drafts, chosen) == tokens


@pytest.mark.parametrize(
    ("text", "tokens", "drafts"),
    [
        ([1, 2, 3, 1, 2, 4, 1, 2], 3, [4, 1, 2]),  # the last earlier occurrence
        ([1, 2, 3, 1, 2], 1, [3]),
        ([5, 5, 5], 4, [5]),  # an occurrence may overlap the ending
        ([1, 2, 3], 4, []),
        ([1], 4, []),
    ],
)
def test_drafts_follow_the_last_equal_ngram(text: list[int], tokens: int, drafts: list[int]) -> None:
    assert ngram_draft(text, 2, tokens) == drafts
