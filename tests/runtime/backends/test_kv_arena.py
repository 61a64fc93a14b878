"""KV arenas: runs of consecutive nodes, and where the rows of accepted nodes are copied to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from medusa_runtime.backends.element_types import FLOAT32, INT32
from medusa_runtime.backends.in_place_arena import InPlaceArena
from medusa_runtime.backends.kv_arena import contiguous_runs
from medusa_runtime.backends.layer_major_arena import LayerMajorArena
from medusa_runtime.backends.token_major_arena import TokenMajorArena
from medusa_runtime.errors import CapacityError
from medusa_runtime.facts import ModelFacts

from .host_device import HostDevice

MODEL = ModelFacts("m", "llama", 2, 8, 2, 1, 4, 16, 64, ())
GROUPED = ModelFacts("m", "llama", 2, 8, 4, 2, 4, 16, 64, ())  # two KV heads


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ([0], [(0, 0, 1)]),
        ([0, 1, 2], [(0, 0, 3)]),
        ([0, 2, 3, 7], [(0, 0, 1), (1, 2, 2), (3, 7, 1)]),
        (range(5), [(0, 0, 5)]),
        ([], []),
    ],
)
def test_contiguous_runs(path: list[int], expected: list[tuple[int, int, int]]) -> None:
    assert list(contiguous_runs(path)) == expected


def test_layer_major_accepted_rows_follow_the_past_of_their_sequence() -> None:
    device = HostDevice()
    arena = LayerMajorArena(device, MODEL, FLOAT32, batch=2, capacity=6, max_nodes=4)
    past = arena._past.array.view(np.float32).reshape(4, 2, 6, 4)
    new = arena._new.array.view(np.float32)
    new[:] = np.arange(new.size)
    rows = new[: 4 * 2 * 3 * 4].reshape(4, 2, 3, 4)  # a step of three nodes, one less than there is room for
    arena.commit(1, [0, 2], 3, nodes=3)
    np.testing.assert_array_equal(past[:, 1, 3], rows[:, 1, 0])
    np.testing.assert_array_equal(past[:, 1, 4], rows[:, 1, 2])
    assert not past[:, 0].any() and not past[:, 1, :3].any() and not past[:, 1, 5].any()
    assert device.copies == [(16, 4), (16, 4)]
    with pytest.raises(RuntimeError, match=r"5 \+ 2 rows do not fit an arena of 6"):
        arena.commit(0, [0, 1], 5, nodes=3)


def test_layer_major_a_larger_arena_gets_all_rows() -> None:
    device = HostDevice()
    small = LayerMajorArena(device, MODEL, FLOAT32, batch=2, capacity=3, max_nodes=1)
    small._past.array.view(np.float32)[:] = np.arange(4 * 2 * 3 * 4)
    large = LayerMajorArena(device, MODEL, FLOAT32, batch=2, capacity=5, max_nodes=1)
    large.copy_sequences_from(small)
    before = small._past.array.view(np.float32).reshape(4, 2, 3, 4)
    after = large._past.array.view(np.float32).reshape(4, 2, 5, 4)
    np.testing.assert_array_equal(after[:, :, :3], before)
    assert not after[:, :, 3:].any()


def test_token_major_accepted_rows_of_all_layers_are_one_copy() -> None:
    device = HostDevice()
    arena = TokenMajorArena(device, MODEL, FLOAT32, batch=2, capacity=6, max_nodes=4)
    [past], [new] = (list(tensors.values()) for tensors in arena.tensors(5, 3))
    assert (past.shape, new.shape) == ((2, 5, 16), (2, 3, 16))
    arena._new.array.view(np.float32)[:] = np.arange(2 * 4 * 16)
    rows = arena.read_new(3, 0)  # a step of three nodes, one less than there is room for
    np.testing.assert_array_equal(rows[:, 1, 2], np.arange(5 * 16, 6 * 16).reshape(4, 4))
    device.copies.clear()
    arena.commit(1, [0, 1, 2], 3, nodes=3)
    kept = arena._past.array.view(np.float32).reshape(2, 6, 16)
    np.testing.assert_array_equal(kept[1, 3:].reshape(3, 4, 4).transpose(1, 0, 2), rows[:, 1])
    assert not kept[0].any() and not kept[1, :3].any()
    assert device.copies == [(64, 3)]
    with pytest.raises(RuntimeError, match=r"5 \+ 2 rows do not fit an arena of 6"):
        arena.commit(0, [0, 1], 5, nodes=3)


def test_token_major_a_larger_arena_gets_all_rows() -> None:
    device = HostDevice()
    small = TokenMajorArena(device, MODEL, FLOAT32, batch=2, capacity=3, max_nodes=1)
    small._past.array.view(np.float32)[:] = np.arange(2 * 3 * 16)
    large = TokenMajorArena(device, MODEL, FLOAT32, batch=2, capacity=5, max_nodes=1)
    large.copy_sequences_from(small)
    before, after = (one._past.array.view(np.float32).reshape(2, -1, 16) for one in (small, large))
    np.testing.assert_array_equal(after[:, :3], before)
    assert not after[:, 3:].any()


def heads_of(arena: InPlaceArena) -> np.ndarray:
    return arena._buffers.array.view(np.float32).reshape(4, 2, arena.capacity + arena.max_nodes, 4)


def test_in_place_a_step_reads_and_writes_the_same_tensors() -> None:
    arena = InPlaceArena(HostDevice(), GROUPED, FLOAT32, batch=1, capacity=6, max_nodes=4)
    inputs, outputs = arena.tensors(5, 3)
    row_indices = inputs.pop("past_rows")
    assert (row_indices.onnx_type, row_indices.shape) == (INT32, (5,))
    np.testing.assert_array_equal(arena._row_indices.array.view(np.int32), np.arange(6))
    assert {name.replace("past", "present"): tensor for name, tensor in inputs.items()} == outputs
    assert {tensor.shape for tensor in inputs.values()} == {(1, 2, 10, 4)}
    assert inputs["past_value_1"].address - inputs["past_key_0"].address == 3 * 2 * 10 * 4 * 4


@pytest.mark.parametrize("path", [[0], [0, 1, 2], [0, 2, 3], [0, 1, 3], [0, 1, 3, 4, 5, 6], [0, 3, 5]], ids=str)
def test_in_place_accepted_rows_move_together(path: list[int]) -> None:
    device = HostDevice()
    arena = InPlaceArena(device, GROUPED, FLOAT32, batch=1, capacity=12, max_nodes=8)
    heads_of(arena)[:] = np.arange(4 * 2 * 20 * 4).reshape(4, 2, 20, 4)
    before = heads_of(arena).copy()
    device.copies.clear()
    arena.commit(0, path, 5, nodes=8)
    np.testing.assert_array_equal(heads_of(arena)[:, :, 5 : 5 + len(path)], before[:, :, [5 + node for node in path]])
    np.testing.assert_array_equal(heads_of(arena)[:, :, :5], before[:, :, :5])
    assert bool(device.copies) is (path != list(range(len(path))))  # rows that are in place are not copied
    with pytest.raises(RuntimeError, match=r"11 \+ 2 rows do not fit an arena of 12"):
        arena.commit(0, [0, 1], 11, nodes=8)


def test_in_place_a_larger_arena_gets_all_rows() -> None:
    device = HostDevice()
    small = InPlaceArena(device, GROUPED, FLOAT32, batch=1, capacity=3, max_nodes=1)
    heads_of(small)[:] = np.arange(4 * 2 * 4 * 4).reshape(4, 2, 4, 4)
    large = InPlaceArena(device, GROUPED, FLOAT32, batch=1, capacity=5, max_nodes=2)
    large.copy_sequences_from(small)
    np.testing.assert_array_equal(heads_of(large)[:, :, :3], heads_of(small)[:, :, :3])
    assert not heads_of(large)[:, :, 3:].any()


def test_in_place_a_batch_is_refused() -> None:
    with pytest.raises(
        CapacityError, match="one sequence at a time, got a batch of 2; load a backend for each sequence"
    ):
        InPlaceArena(HostDevice(), GROUPED, FLOAT32, batch=2, capacity=6, max_nodes=4)


@pytest.mark.parametrize("sequence", [0, 1])
@pytest.mark.parametrize("arena", [LayerMajorArena, TokenMajorArena, InPlaceArena])
def test_saved_rows_come_back_to_an_arena_of_any_capacity(arena: Any, sequence: int) -> None:
    device, is_in_place = HostDevice(), arena is InPlaceArena
    if is_in_place and sequence:
        pytest.skip("such an arena has one sequence")
    batch, buffer = 1 if is_in_place else 2, "_buffers" if is_in_place else "_past"

    def rows(of: Any) -> np.ndarray[Any, Any]:
        """(tensors, B, rows of the arena, elements of a row)"""
        shape = (8, 1, -1, 4) if is_in_place else (1, 2, -1, 32) if arena is TokenMajorArena else (4, 2, -1, 8)
        found: np.ndarray[Any, Any] = getattr(of, buffer).array.view(np.float32).reshape(shape)
        return found

    small = arena(device, GROUPED, FLOAT32, batch=batch, capacity=6, max_nodes=2)
    rows(small)[:] = np.arange(rows(small).size).reshape(rows(small).shape)
    before = rows(small).copy()
    saved = small.save(sequence, 5)
    assert saved.size == 5 * GROUPED.kv_bytes_per_token(4)
    rows(small)[:] = -1
    large = arena(device, GROUPED, FLOAT32, batch=batch, capacity=9, max_nodes=3)
    for target, length in ((small, 5), (large, 5), (large, 3)):
        rows(target)[:] = -1
        target.restore(sequence, saved, 5, length)
        kept = rows(target)
        np.testing.assert_array_equal(kept[:, sequence, :length], before[:, sequence, :length])
        assert (kept[:, sequence, length:] == -1).all()
        assert (np.delete(kept, sequence, axis=1) == -1).all()
