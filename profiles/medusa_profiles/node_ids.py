"""The ids of tree nodes: how the graph's `input_ids` say which token a node holds.

A node is one of three things, told apart by its id alone, so that one tensor of int32 can mix them:

=============================  ==========================  =====================================================
Id                             Range                       The node holds
=============================  ==========================  =====================================================
a token id                     0 and above                 that token, a literal
-1 - (head * top_k + rank)     -2**20 to -1                the candidate of that rank of a head
-1 - 2**20 - rank              below -2**20                the candidate of that rank that follows the parent node
=============================  ==========================  =====================================================

Candidates of a head are known before the tree is filled. Candidates of a parent depend on the token that the parent
holds, so they are filled level by level, as sequential drafting does. No graph offers the third kind yet; its ids are
reserved, and backends refuse them.

Example with top_k = 10::

    head_candidate_id(0, 0, 10)   # -1, the most likely token of head 0
    head_candidate_id(1, 2, 10)   # -13, rank 2 of head 1
    parent_candidate_id(0)        # -1048577, the token most likely to follow the parent
"""

from __future__ import annotations

from typing import NamedTuple

MAX_HEAD_CANDIDATES = 2**20  # heads · top_k at most
MAX_PARENT_CANDIDATES = 2**31 - 2**20  # ids are int32


class Literal(NamedTuple):
    """A node that holds a token known to the host."""

    token: int


class HeadCandidate(NamedTuple):
    """A node that holds the candidate of rank `rank` of head `head`, both 0-based."""

    head: int
    rank: int


class ParentCandidate(NamedTuple):
    """A node that holds the candidate of rank `rank`, 0-based, among those that follow its parent's token."""

    rank: int


def head_candidate_id(head: int, rank: int, top_k: int) -> int:
    """Return the id of a head's candidate.

    Args:
        head: The head, 0-based.
        rank: The rank, 0-based, below `top_k`.
        top_k: Candidates that each head ranks.

    Raises:
        ValueError: The rank would be another head's candidate, or the id is outside the range of heads' candidates.
    """
    if not (0 <= rank < top_k and head >= 0 and head * top_k + rank < MAX_HEAD_CANDIDATES):
        raise ValueError(
            f"head {head}, rank {rank} of {top_k} has no id; expected a rank from 0 to {top_k - 1} and "
            f"head * {top_k} + rank from 0 to {MAX_HEAD_CANDIDATES - 1}: use fewer heads or candidates"
        )
    return -1 - (head * top_k + rank)


def parent_candidate_id(rank: int) -> int:
    """Return the id of a candidate that follows the parent node. Raises ValueError for a rank outside the range."""
    if not 0 <= rank < MAX_PARENT_CANDIDATES:
        raise ValueError(f"rank {rank} has no id; expected a rank from 0 to {MAX_PARENT_CANDIDATES - 1}")
    return -1 - MAX_HEAD_CANDIDATES - rank


def decode_node_id(node_id: int, top_k: int) -> Literal | HeadCandidate | ParentCandidate:
    """Return what a node holds.

    Args:
        node_id: One element of `input_ids`.
        top_k: Candidates that each head ranks.
    """
    number = -1 - node_id
    if number < 0:
        return Literal(node_id)
    if number < MAX_HEAD_CANDIDATES:
        return HeadCandidate(*divmod(number, top_k))
    return ParentCandidate(number - MAX_HEAD_CANDIDATES)


def describe(node_id: int, top_k: int) -> str:
    """Return in words what a node holds, for error messages; the arguments are those of `decode_node_id`."""
    node = decode_node_id(node_id, top_k)
    if isinstance(node, Literal):
        return f"token {node.token}"
    if isinstance(node, HeadCandidate):
        return f"rank {node.rank} of head {node.head}"
    return f"rank {node.rank} among the candidates of its parent"
