"""A token tree: which candidates of the heads one step verifies, and which candidate follows which."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from medusa_profiles.node_ids import MAX_HEAD_CANDIDATES, head_candidate_id

MAX_NODES = 1024
MAX_RANK = 4095
HEADS, PARENTS = "heads", "parents"
CANDIDATES = (HEADS, PARENTS)  # what the ranks of a tree may refer to
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

Path = tuple[int, ...]
IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]
Scalar = TypeVar("Scalar", bound=np.generic)


class ProfileError(ValueError):
    """A tree is malformed or unknown, or needs more heads or candidates than a bundle has."""


@dataclass(frozen=True)
class TreeProfile:
    """An immutable token tree of T nodes; node 0 is the root, the last token that is already decided.

    A path lists the rank (0-based) chosen among the head's candidates at each depth: [0, 2] is the third candidate of
    head 1 behind the first candidate of head 0. Each path adds one node, so every prefix of a path must be listed too.
    Nodes are numbered in lexicographic order of their paths, which is depth-first preorder: a parent precedes its
    children, and the chain of most likely candidates [0], [0, 0], ... follows the root directly.

    Example::

        tree = TreeProfile("small", ((0,), (0, 0), (1,)))
        tree.size           # 4: the root and three candidates
        tree.parents        # [-1, 0, 1, 0]
        tree.depths         # [0, 1, 2, 1]
        tree.mask           # [[1, 0, 0, 0],  node 0 attends to itself,
                            #  [1, 1, 0, 0],  node 1 to the root and itself,
                            #  [1, 1, 1, 0],  node 2 to the root, node 1 and itself,
                            #  [1, 0, 0, 1]]  node 3 to the root and itself
        tree.candidate_ids(top_k=10)  # [0, -1, -11, -2]

    Args:
        name: 1 to 64 lower-case letters, digits, `.`, `_` and `-`; it becomes a file name.
        paths: One path for each node but the root, in any order and as any sequence type.
        source: Where the tree comes from, one line of text.
        candidates: What the ranks refer to: "heads", the candidates of the head of a node's depth, as above; or
            "parents", the candidates that follow the token of a node's parent, which no graph offers yet.

    Raises:
        ProfileError: A path is empty or repeated, has no parent, or holds anything but ranks from 0 to 4095; there are
            more than 1,024 nodes; or another argument is not as above.
    """

    name: str
    paths: tuple[Path, ...]
    source: str = ""
    candidates: str = HEADS

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_source(self.name, self.source)
        _check_candidates(self.name, self.candidates)
        object.__setattr__(self, "paths", _canonical_paths(self.name, self.paths))

    def __reduce__(self) -> tuple[type[TreeProfile], tuple[str, tuple[Path, ...], str, str]]:
        """Pickle by value, so that a copy is checked again and its arrays are read-only too."""
        return TreeProfile, (self.name, self.paths, self.source, self.candidates)

    @classmethod
    def plain(cls) -> TreeProfile:
        """Return the tree of the root alone, which is plain decoding."""
        return cls("plain", (), "plain decoding, no candidates")

    @cached_property
    def size(self) -> int:
        """Number of nodes T, including the root."""
        return len(self.paths) + 1

    @cached_property
    def depth(self) -> int:
        """Length of the longest path, which is the number of heads needed; 0 for the root alone."""
        return max(map(len, self.paths), default=0)

    @cached_property
    def max_rank(self) -> int:
        """Highest rank in use; -1 for the root alone."""
        return max(map(max, self.paths), default=-1)

    @cached_property
    def parents(self) -> IntArray:
        """Parent of each node, (T,) int32; always a lower index, and -1 at the root."""
        index = {(): 0} | {path: node for node, path in enumerate(self.paths, start=1)}
        return _read_only(np.array([-1, *(index[path[:-1]] for path in self.paths)], np.int32))

    @cached_property
    def depths(self) -> IntArray:
        """Depth of each node, (T,) int32, 0 at the root; its position id is past_length + depth."""
        return _read_only(np.array([0, *map(len, self.paths)], np.int32))

    @cached_property
    def heads(self) -> IntArray:
        """Head (0-based) that proposes each node, (T,) int32: depth - 1, and -1 at the root."""
        return _read_only(self.depths - np.int32(1))

    @cached_property
    def ranks(self) -> IntArray:
        """Rank (0-based) of each node among its head's candidates, (T,) int32; -1 at the root."""
        return _read_only(np.array([-1, *(path[-1] for path in self.paths)], np.int32))

    @cached_property
    def mask(self) -> BoolArray:
        """Attention mask, (T, T) bool: node i attends to node j where j is i itself or an ancestor of i."""
        mask = np.eye(self.size, dtype=np.bool_)  # (T, T)
        for node in range(1, self.size):
            mask[node] |= mask[self.parents[node]]
        return _read_only(mask)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of each node, T tuples of node indices in ascending rank."""
        children: list[list[int]] = [[] for _ in range(self.size)]
        for node in range(1, self.size):
            children[self.parents[node]].append(node)
        return tuple(map(tuple, children))

    @cached_property
    def chain_length(self) -> int:
        """Length of the chain of most likely candidates [0], [0, 0], ..., which are the nodes 1 to chain_length."""
        return sum(not any(path) for path in self.paths)

    @property
    def is_chain(self) -> bool:
        """Whether no node has a sibling, as in the chain of most likely candidates and in plain decoding."""
        return self.chain_length == self.size - 1

    def candidate_ids(self, top_k: int) -> IntArray:
        """Return the graph's `input_ids` for this tree, a new array (T,) int32.

        A candidate is encoded as -1 - (head * top_k + rank), see `medusa_profiles.node_ids`. The root's entry is 0, to
        be replaced by its token id.

        Args:
            top_k: Candidates that each head ranks.

        Raises:
            ProfileError: A rank is not below top_k, so that it would refer to another head's candidate; the heads rank
                more candidates than there are ids; or the ranks are not those of heads.
        """
        self.check_fits(self.depth, top_k)
        ids = [head_candidate_id(len(path) - 1, path[-1], top_k) for path in self.paths]
        return np.array([0, *ids], np.int32)

    def check_candidates(self) -> None:
        """Raise ProfileError unless the ranks are those of the heads' candidates, the only ones that graphs offer."""
        if self.candidates != HEADS:
            raise ProfileError(
                f"tree '{self.name}' has candidates = {self.candidates!r}, ranks among the candidates of each parent, "
                f"which no graph offers yet; expected {HEADS!r}: choose a tree of the heads' candidates"
            )

    def check_fits(self, heads: int, top_k: int) -> None:
        """Raise ProfileError unless `heads` heads, each of which ranks `top_k` candidates, can fill this tree."""
        self.check_candidates()
        if heads * top_k > MAX_HEAD_CANDIDATES:
            raise ProfileError(
                f"{heads} heads of {top_k} candidates each have {heads * top_k} candidates, expected at most "
                f"{MAX_HEAD_CANDIDATES}; use heads that rank fewer"
            )
        if self.paths and not heads:
            raise ProfileError(
                f"tree '{self.name}' has candidates of heads, but there are no heads; leave the tree out, or build "
                "with --heads"
            )
        for path in self.paths:
            if len(path) > heads:
                raise ProfileError(
                    f"tree '{self.name}' has a path of depth {len(path)} ({list(path)}) "
                    f"but the bundle has {heads} head{'' if heads == 1 else 's'}"
                )
            if path[-1] >= top_k:
                raise ProfileError(
                    f"tree '{self.name}' has a path with rank {path[-1]} ({list(path)}) "
                    f"but the bundle keeps the top {top_k} of each head (ranks start at 0)"
                )


def _read_only(array: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    array.setflags(write=False)
    return array


def _check_name(name: object) -> None:
    """Raise ProfileError unless the name is safe as a file name on every system."""
    if not isinstance(name, str):
        raise ProfileError(f"a tree's name must be a string, got {_kind(name)}")
    if not NAME_PATTERN.fullmatch(name):
        raise ProfileError(
            f"tree name {shown(name)} is not allowed: use 1 to 64 lower-case letters, digits, '.', '_' and '-', "
            "starting with a letter or digit"
        )


def _check_source(name: str, source: object) -> None:
    """Raise ProfileError unless the source is one line of printable text."""
    if not isinstance(source, str):
        raise ProfileError(f"tree '{name}': source must be a string, got {_kind(source)}")
    if not source.isprintable():
        raise ProfileError(f"tree '{name}': source must be one line of printable text, got {shown(source)}")


def _check_candidates(name: str, candidates: object) -> None:
    """Raise ProfileError unless `candidates` is one of CANDIDATES."""
    if not isinstance(candidates, str):
        raise ProfileError(f"tree '{name}': candidates must be a string, got {_kind(candidates)}")
    if candidates not in CANDIDATES:
        raise ProfileError(
            f"tree '{name}': candidates is {shown(candidates)}; expected one of {', '.join(map(repr, CANDIDATES))}"
        )


def _canonical_paths(name: str, paths: object) -> tuple[Path, ...]:
    """Return the paths in lexicographic order as tuples of int, or raise ProfileError naming the wrong one."""
    if not isinstance(paths, (list, tuple)):
        raise ProfileError(f"tree '{name}': paths must be a list of lists of ranks, got {_kind(paths)}")
    if len(paths) + 1 > MAX_NODES:
        raise ProfileError(f"tree '{name}' has {len(paths) + 1} nodes, root included; at most {MAX_NODES} are allowed")
    ordered = sorted(_path(name, position, path) for position, path in enumerate(paths))
    known = set(ordered)
    for position, path in enumerate(ordered):
        if position and path == ordered[position - 1]:
            raise ProfileError(f"tree '{name}': path {list(path)} is listed more than once")
        if len(path) > 1 and path[:-1] not in known:
            raise ProfileError(f"tree '{name}': path {list(path)} has no parent, add {list(path[:-1])}")
    return tuple(ordered)


def _path(name: str, position: int, path: object) -> Path:
    """Return one path as a tuple of int, or raise ProfileError naming its position in the list."""
    where = f"tree '{name}': paths[{position}]"
    if not isinstance(path, (list, tuple)):
        raise ProfileError(f"{where} must be a list of ranks, got {_kind(path)}")
    if not path:
        raise ProfileError(f"{where} is empty; the root is not listed")
    return tuple(_rank(f"{where}[{depth}]", rank) for depth, rank in enumerate(path))


def _rank(where: str, rank: object) -> int:
    """Return a rank as int, or raise ProfileError if it is no integer from 0 to MAX_RANK."""
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)):
        raise ProfileError(f"{where} must be an integer, got {_kind(rank)}")
    if not 0 <= rank <= MAX_RANK:
        raise ProfileError(f"{where} must be a rank from 0 to {MAX_RANK}, got {shown(rank)}")
    return int(rank)


def _kind(value: object) -> str:
    """Describe a value of the wrong type for an error message."""
    return f"{type(value).__name__} {shown(value)}"


def shown(value: object) -> str:
    """Return the first 80 characters of a value's repr; a number of thousands of digits, or a deep list, has none."""
    try:
        return f"{value!r:.80}"
    except (ValueError, RecursionError):
        return "a value too long to show"
