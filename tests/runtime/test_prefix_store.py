"""The store of rows: the longest common prefix against a search by hand, the budget, and what makes room."""

from __future__ import annotations

import numpy as np
import pytest
from medusa_runtime import prefix_store
from medusa_runtime.backends.base import IntArray
from medusa_runtime.backends.saved_past import SavedPast
from medusa_runtime.prefix_store import PrefixStore, common_prefix

ROW = 10  # bytes


def ids_of(tokens: list[int]) -> IntArray:
    return np.array(tokens, np.int32)


def add(store: PrefixStore, tokens: list[int]) -> bool:
    return store.add(ids_of(tokens), ROW * len(tokens), lambda: SavedPast(len(tokens), tuple(tokens)))


def found(store: PrefixStore, tokens: list[int], longer_than: int = 0) -> tuple[list[int], int] | None:
    hit = store.find(ids_of(tokens), longer_than)
    if hit is None:
        return None
    entry, length = hit
    assert entry.past.data == tuple(entry.ids.tolist()) and entry.past.length == len(entry.ids)
    return entry.ids.tolist(), length


def by_hand(first: list[int], second: list[int]) -> int:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([], [], 0), ([], [1], 0), ([1], [1], 1), ([1], [2], 0), ([1, 2, 3], [1, 2], 2), ([1, 2, 3], [1, 9, 3], 1)],
)
def test_common_prefix(first: list[int], second: list[int], expected: int) -> None:
    assert common_prefix(ids_of(first), ids_of(second)) == expected
    assert common_prefix(ids_of(second), ids_of(first)) == expected


@pytest.mark.parametrize("seed", range(40))
def test_random_sequences_are_found_and_evicted_as_in_a_search_by_hand(seed: int) -> None:
    rng = np.random.default_rng(seed)
    budget = int(rng.integers(1, 60)) * ROW
    store, kept = PrefixStore(budget), list[list[int]]()  # what is kept, the least recently used first
    for _ in range(150):
        tokens = rng.integers(3, size=rng.integers(1, 12)).tolist()
        if rng.random() < 0.5:
            longer_than = int(rng.integers(3))
            best = max([by_hand(one, tokens) for one in kept], default=0)
            hit = found(store, tokens, longer_than)
            assert (0 if hit is None else hit[1]) == (best if best > longer_than else 0)
            if hit is not None:
                newest = [one for one in kept if by_hand(one, tokens) == best][-1]
                assert hit[0] == newest
                kept.remove(newest)
                kept.append(newest)
        else:
            longer = [one for one in kept if by_hand(one, tokens) == len(tokens)]
            assert len(longer) <= 1 or not add(store, tokens)
            if len(longer) > 1:
                break  # which of them counts as used is not specified
            added = add(store, tokens)
            if longer:
                assert not added
                kept.remove(longer[0])
                kept.append(longer[0])
            elif len(tokens) * ROW > budget:
                assert not added
            else:
                assert added
                kept = [one for one in kept if by_hand(one, tokens) < len(one)]
                while sum(map(len, kept)) * ROW + len(tokens) * ROW > budget:
                    del kept[0]
                kept.append(tokens)
        assert store.size == sum(map(len, kept)) * ROW <= budget
        assert len(store) == len(kept)
        assert [entry.ids.tolist() for entry in store._entries] == kept


def test_a_longer_sequence_takes_the_place_of_its_prefixes() -> None:
    store = PrefixStore(100 * ROW)
    for tokens in ([1, 2], [1, 3], [1, 2, 3, 4]):
        assert add(store, tokens)
    assert len(store) == 2 and store.size == 6 * ROW
    assert not add(store, [1, 2, 3])  # its rows are there
    assert found(store, [1, 2, 3, 9]) == ([1, 2, 3, 4], 3)
    assert found(store, [1, 2, 3, 9], longer_than=3) is None
    store.clear()
    assert (len(store), store.size, found(store, [1, 2])) == (0, 0, None)


def test_what_was_used_last_is_kept() -> None:
    store = PrefixStore(6 * ROW)
    for tokens in ([1, 1], [2, 2], [3, 3]):
        add(store, tokens)
    assert found(store, [1, 1, 5]) == ([1, 1], 2)
    add(store, [4, 4])
    assert found(store, [2, 2]) is None
    assert found(store, [1, 1]) is not None and found(store, [3, 3]) is not None


def test_a_sequence_beyond_the_budget_is_refused_and_costs_no_other() -> None:
    store = PrefixStore(4 * ROW)
    assert add(store, [1, 2])
    assert not add(store, [1, 2, 3, 4, 5])
    assert found(store, [1, 2, 3]) == ([1, 2], 2)


def test_the_number_of_entries_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_store, "MAX_ENTRIES", 3)
    store = PrefixStore(1 << 30)
    for token in range(10):
        add(store, [token, token])
    assert [entry.ids[0] for entry in store._entries] == [7, 8, 9]


def test_room_is_made_before_rows_are_copied() -> None:
    store, sizes = PrefixStore(4 * ROW), []

    def save() -> SavedPast:
        sizes.append(store.size)
        raise MemoryError

    add(store, [1, 2])
    add(store, [3, 4])
    with pytest.raises(MemoryError):
        store.add(ids_of([5, 6, 7]), 3 * ROW, save)
    assert sizes == [0] and len(store) == 0
    assert add(store, [5, 6, 7]) and found(store, [5, 6, 9]) == ([5, 6, 7], 2)
