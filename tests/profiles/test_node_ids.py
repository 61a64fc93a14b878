import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from medusa_profiles.node_ids import (
    MAX_HEAD_CANDIDATES,
    MAX_PARENT_CANDIDATES,
    HeadCandidate,
    Literal,
    ParentCandidate,
    decode_node_id,
    describe,
    head_candidate_id,
    parent_candidate_id,
)


def test_the_ranges_of_ids_meet_and_do_not_overlap():
    assert head_candidate_id(0, 0, 10) == -1
    assert head_candidate_id(1, 2, 10) == -13
    assert head_candidate_id(3, 2**18 - 1, 2**18) == -(2**20)
    assert parent_candidate_id(0) == -(2**20) - 1
    assert parent_candidate_id(MAX_PARENT_CANDIDATES - 1) == np.iinfo(np.int32).min


@given(st.integers(1, 5000), st.data())
def test_an_id_is_decoded_to_what_it_was_made_of(top_k, data):
    number = data.draw(st.integers(0, MAX_HEAD_CANDIDATES - 1))
    head, rank = divmod(number, top_k)
    assert decode_node_id(head_candidate_id(head, rank, top_k), top_k) == HeadCandidate(head, rank)
    other = data.draw(st.integers(0, MAX_PARENT_CANDIDATES - 1))
    assert decode_node_id(parent_candidate_id(other), top_k) == ParentCandidate(other)
    token = data.draw(st.integers(0, 2**31 - 1))
    assert decode_node_id(token, top_k) == Literal(token)


@pytest.mark.parametrize(("head", "rank", "top_k"), [(0, 10, 10), (0, -1, 10), (-1, 3, 10), (2**18, 0, 4), (0, 0, 0)])
def test_a_candidate_without_an_id_is_refused(head, rank, top_k):
    with pytest.raises(ValueError, match=f"head {head}, rank {rank} of {top_k} has no id; expected a rank from 0"):
        head_candidate_id(head, rank, top_k)


@pytest.mark.parametrize("rank", [-1, MAX_PARENT_CANDIDATES])
def test_a_rank_behind_a_parent_without_an_id_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank {rank} has no id; expected a rank from 0 to"):
        parent_candidate_id(rank)


@pytest.mark.parametrize(
    ("node_id", "words"),
    [(5, "token 5"), (-13, "rank 2 of head 1"), (-(2**20) - 4, "rank 3 among the candidates of its parent")],
)
def test_a_node_in_words(node_id, words):
    assert describe(node_id, 10) == words
