"""GPU backends on a device that is the host: allocations, failed allocations, interrupts, threads, order of freeing."""

from __future__ import annotations

import contextlib
import gc
import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from medusa_runtime import contract
from medusa_runtime.backends.base import PREFILL_CHUNK, Step, literal_step
from medusa_runtime.backends.device import DeviceTensor
from medusa_runtime.backends.device_backend import DeviceBackend
from medusa_runtime.backends.in_place_arena import InPlaceArena
from medusa_runtime.backends.kv_arena import ArenaFactory
from medusa_runtime.backends.layer_major_arena import LayerMajorArena
from medusa_runtime.backends.step_shape import StepShape
from medusa_runtime.backends.token_major_arena import TokenMajorArena
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import BackendError, BusyError, CapacityError, MedusaError, WrongThreadError
from medusa_runtime.facts import HeadFacts, ModelFacts
from medusa_runtime.kv_cache import KvCache

from ..decoding import begun
from ..fake_backend import summary_of
from ..interrupting import elsewhere, interrupted
from .fake_tensorrt import at
from .host_device import Block, HostDevice

VOCAB = 97
MODEL = ModelFacts("toy", "toy", 1, 4, 1, 1, 1, VOCAB, 2048, ())
HEADS = HeadFacts(1, 1, "none", 1)
SIZES = {1: 4, 6: 4, 9: 1}  # bytes by ONNX's number of a type


class Counting(HostDevice):
    """Records every allocation, and refuses the one with number `fails`, from 0."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: dict[int, int] = {}
        self.asked: list[int] = []
        self.held: list[Block] = []
        self.fails: int | None = None

    def allocate(self, size: int) -> Block:
        self.asked.append(size)
        if self.fails == len(self.asked) - 1:
            raise CapacityError(f"no memory for {size} bytes")
        block = super().allocate(size)
        self.blocks[block.address] = max(size, 1)
        self.held.append(block)  # so that no address is used twice
        return block

    allocate_host = allocate


class Run:
    """A toy model: the next token is 7 plus the sum of all before it; a key is the token, a value its negation."""

    def __init__(
        self, toy: Toy, shape: StepShape, inputs: dict[str, DeviceTensor], outputs: dict[str, DeviceTensor]
    ) -> None:
        self.shape, self.toy = shape, toy
        for name, tensor in (inputs | outputs).items():
            start = max(start for start in toy.device.blocks if start <= tensor.address)
            end = tensor.address + int(np.prod(tensor.shape)) * SIZES[tensor.onnx_type]
            assert end <= start + toy.device.blocks[start], f"{name} {tensor.shape} is bound to a smaller buffer"
        self.inputs, self.outputs = inputs, outputs

    def array(self, name: str, dtype: Any = np.int32) -> Any:
        tensor = (self.inputs | self.outputs)[name]
        return at(tensor.address, tensor.shape, dtype)

    def run(self) -> None:
        if self.toy.failure is not None:
            raise self.toy.failure
        ids, length = self.array(contract.INPUT_IDS), self.array(contract.PAST_LENGTH)
        mask, rows = self.array(contract.TREE_MASK, np.bool_), self.array(contract.LOGIT_ROWS)
        tokens, argmax = self.array(contract.TOKENS), self.array(contract.ARGMAX)
        keys = self.array(contract.past_key(0), np.float32)
        logits, hidden = (self.array(name, np.float32) for name in (contract.LOGITS, contract.HIDDEN))
        tokens[:] = ids
        logits[:] = 0
        for b in range(self.shape.B):
            sums = 7 + keys[b, : length[b], 0].sum() + mask[b] @ tokens[b]
            argmax[b] = sums[rows[b]] % VOCAB
            logits[b, np.arange(self.shape.R), argmax[b]] = 1
        hidden[:] = tokens[..., None]
        finite, ids, top, sums = (
            self.array(name, dtype)
            for name, dtype in zip(contract.SUMMARY_OUTPUTS, (np.bool_, np.int32, np.float32, np.float32), strict=True)
        )
        finite[:] = np.isfinite(logits).all(-1)
        for b, row in np.ndindex(*sums.shape):
            found = summary_of(logits[b, self.array(contract.SUMMARY_ROWS)[b, row]])
            ids[b, row], top[b, row], sums[b, row], _ = found
        self.array(contract.new_key(0), np.float32)[:, :, 0] = tokens
        self.array(contract.new_value(0), np.float32)[:, :, 0] = -tokens


class Toy(DeviceBackend):
    failure: Exception | None = None  # raised by a run
    refusal: Exception | None = None  # raised when a binding is made

    def __init__(self, arena: ArenaFactory = LayerMajorArena) -> None:
        self.device = Counting()
        super().__init__("toy", "fp32", MODEL, HEADS, self.device)
        self._new_arena = arena

    def _unload(self) -> None:
        pass

    def _padded_shape(self, shape: StepShape) -> StepShape:
        return shape

    def _new_runner(self, shape: StepShape, inputs: dict[str, DeviceTensor], outputs: dict[str, DeviceTensor]) -> Run:
        if self.refusal is not None:
            raise self.refusal
        return Run(self, shape, inputs, outputs)


def literal(ids: list[int], length: int = 0, batch: int = 1) -> Step:
    one = literal_step(np.array(ids, np.int32), length, np.arange(len(ids), dtype=np.int32))
    return Step(**{
        name: np.repeat(array, batch, axis=0) if isinstance(array, np.ndarray) else array
        for name, array in vars(one).items()
    })  # fmt: skip


def expected(tokens: list[int]) -> int:
    return (7 + sum(tokens)) % VOCAB


def test_the_first_tree_step_allocates_no_second_arena() -> None:
    toy = Toy()
    toy.allocate(1, 8)
    arena = 2 * MODEL.context * 4
    toy.run(literal_step(np.array([3, 4], np.int32), 0, np.array([1], np.int32)))
    toy.run(literal([5] * 16, 2))
    assert [size for size in toy.device.asked if size >= arena] == [arena]


@pytest.mark.parametrize("arena", [LayerMajorArena, InPlaceArena, TokenMajorArena])
def test_an_arena_with_room_for_more_nodes_has_all_the_rows(arena: Any) -> None:
    device = Counting()
    small = arena(device, MODEL, Toy()._kv_type, 1, 64, 4)
    name = "_buffers" if arena is InPlaceArena else "_past"
    rows = getattr(small, name).array.view(np.float32)
    rows[:] = np.arange(rows.size)
    large = small.with_max_nodes(32)
    assert (small.max_nodes, large.max_nodes, large.capacity) == (4, 32, 64)
    kept = getattr(large, name).array.view(np.float32)
    if arena is InPlaceArena:
        np.testing.assert_array_equal(kept.reshape(2, 96)[:, :64], rows.reshape(2, 68)[:, :64])
    else:
        np.testing.assert_array_equal(kept, rows)
    for name, tensor in large.tensors(64, 32)[1].items():
        start = max(start for start in device.blocks if start <= tensor.address)
        assert tensor.address + int(np.prod(tensor.shape)) * 4 <= start + device.blocks[start], name


def test_bindings_made_before_the_outputs_grew_still_run() -> None:
    toy = Toy()
    toy.allocate(1, 8)
    small, large = literal([3, 4]), literal([5, 6, 7, 8])
    for step in (small, large, small, large, small):
        toy.run(step)
        tokens = step.input_ids[0].tolist()
        wanted = [expected(tokens[: row + 1]) for row in range(len(tokens))]
        assert toy.read_argmax() == wanted
        assert [int(toy.read_logits(row).argmax()) for row in range(len(tokens))] == wanted
    assert toy._cache is not None and len(toy._cache.shapes) == 2


def test_an_arena_that_was_replaced_is_freed_before_the_next_binding_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy()
    toy.allocate(1, 8)
    toy.run(literal([3]))
    assert toy._cache is not None
    arena, new_runner = weakref.ref(toy._cache.memory.arena), toy._new_runner
    freed = []
    monkeypatch.setattr(toy, "_new_runner", lambda *given: (freed.append(arena() is None), new_runner(*given))[1])
    toy.run(literal([8] * (PREFILL_CHUNK + 9), 1))
    assert freed == [True]


def work_of(toy: Toy) -> None:
    """Steps of one sequence, each of which needs more memory than the one before."""
    toy.allocate(1, 8)
    toy.run(literal_step(np.array([3, 4], np.int32), 0, np.array([1], np.int32)))
    toy.commit(0, [0, 1], 0)
    toy.run(literal([5, 6, 7], 2))
    toy.commit(0, [0], 2)
    toy.run(literal([8] * (PREFILL_CHUNK + 9), 3))


@pytest.mark.parametrize(("batch", "rows"), [(1, MODEL.context), (2, 8)])
def test_a_past_that_does_not_fit_the_allocated_rows_is_refused(batch: int, rows: int) -> None:
    toy = Toy()
    toy.allocate(batch, 8)
    toy.run(literal([1, 2, 3], rows, batch))  # as engines are timed
    with pytest.raises(RuntimeError, match=f"a past of {rows + 1} rows does not fit an arena of {rows}; allocate"):
        toy.run(literal([1, 2, 3], rows + 1, batch))


@pytest.mark.parametrize("batch", [1, 2])
def test_summaries_are_those_of_the_rows(batch: int) -> None:
    toy = Toy()
    toy.allocate(batch, 8)
    step = replace(literal([3, 4, 5], batch=batch), summaries=True)
    step.input_ids[-1] += 20
    for _ in range(2):
        toy.run(step)
        for sequence, row in np.ndindex(batch, 3):
            found, expected = toy.read_summary(row, sequence), summary_of(toy.read_logits(row, sequence))
            assert found is not None and (found.logsumexp, found.finite) == (np.float32(expected.logsumexp), True)
            np.testing.assert_array_equal(found.ids, expected.ids)
            np.testing.assert_array_equal(found.logits, expected.logits)
            assert found.ids[0] == toy.read_argmax(sequence)[row]
        with pytest.raises(IndexError, match="row 3 does not exist; expected one from 0 to 2"):
            toy.read_summary(3)
        with pytest.raises(IndexError, match=f"sequence {batch} does not exist"):
            toy.read_summary(0, batch)
        toy.run(replace(step, summaries=False))  # of another shape
        assert toy.read_summary(0) is None
    assert toy._cache is not None and [shape.S for shape in toy._cache.shapes] == [3, 0]


@pytest.mark.parametrize(
    ("least", "draft", "message"),
    [
        (-1, False, "a node has the id -1, rank 0 of head 0; expected token ids only in a step without a draft"),
        (-2, True, r"a node has the id -2, rank 0 of head 1; expected token ids and the heads' candidates, -1 to -1"),
        (-1 - 2**20, True, "a node has the id -1048577, rank 0 among the candidates of its parent; expected"),
        (-1 - 2**20, False, "rank 0 among the candidates of its parent; expected token ids only"),
        (-(2**31), True, "among the candidates of its parent"),
    ],
)
def test_node_ids_that_no_graph_fills_are_refused_before_the_step_runs(least: int, draft: bool, message: str) -> None:
    toy = Toy()
    toy.allocate(1, 8)
    step = replace(literal([3, 4, 5]), draft=draft)
    toy.run(step)
    toy.commit(0, [0], 0)
    step.input_ids[0, 2] = least  # a step may be changed in place
    with pytest.raises(RuntimeError, match=message):
        toy.run(step)
    with pytest.raises(RuntimeError, match="no step has been run"):
        toy.read_tokens()


def test_a_failed_allocation_changes_nothing() -> None:
    """Each allocation in turn: all rows are kept, smaller steps run, and the larger one runs once there is memory."""
    fails, failed = 0, True
    while failed:
        toy = Toy()
        toy.device.fails = fails
        with contextlib.suppress(CapacityError):
            work_of(toy)
            failed = False
        toy.device.fails = None
        if failed and toy._cache is not None:
            past: Any = toy._cache.memory.arena
            length = np.count_nonzero(past._past.array.view(np.float32)[:3])  # of the keys 3, 4 and 5
            for ids in ([9], [9, 8, 7], [8] * (PREFILL_CHUNK + 9)):
                toy.run(literal(ids, length))
                assert toy.read_argmax()[0] == expected([*[3, 4, 5][:length], ids[0]]), (fails, ids)
                assert int(toy.read_logits(len(ids) - 1).argmax()) == toy.read_argmax()[-1]
        work_of(toy)
        fails += 1
    assert fails > 8


def test_another_batch_keeps_the_rows_of_common_sequences() -> None:
    toy = Toy()
    toy.allocate(1, 8)
    toy.run(literal([3, 4]))
    toy.commit(0, [0, 1], 0)
    toy.allocate(2, 16)
    toy.run(literal([5], 2, batch=2))
    assert toy.read_argmax(0) == [expected([3, 4, 5])]
    assert toy.read_argmax(1) == [expected([0, 0, 5])]  # zero-filled
    assert toy._cache is not None
    assert toy._cache.memory.draft_hidden.array.view(np.float32)[:4].tolist() == [4.0] * 4  # type: ignore[attr-defined]
    toy.commit(1, [0], 2)
    toy.allocate(2, 900)
    toy.run(literal([6], 3, batch=2))
    assert toy.read_argmax(1) == [expected([5, 6])]


def test_a_batch_that_an_arena_refuses_changes_nothing() -> None:
    toy = Toy()
    toy.allocate(1, 8)
    toy.run(literal([3, 4]))
    toy.commit(0, [0, 1], 0)
    toy._new_arena = InPlaceArena
    with pytest.raises(CapacityError, match="one sequence at a time, got a batch of 2"):
        toy.allocate(2, 16)
    toy.run(literal([5], 2))
    assert toy.read_argmax() == [expected([3, 4, 5])]


def answer(decoder: Decoder, tokens: int = 6) -> list[int]:
    decoder.start([3, 4], tokens, ())
    assert decoder.sequence is not None
    while decoder.sequence.finish_reason is None:
        decoder.step()
    return decoder.sequence.answer


def test_an_interrupt_anywhere_in_a_step_costs_no_token() -> None:
    wanted, number, came_so_far, held = answer(Decoder(Toy())), 0, True, []
    files = (
        "batch_memory.py",
        "binding_cache.py",
        "completed_run.py",
        "device_backend.py",
        "device_outputs.py",
        "kv_arena.py",
        "layer_major_arena.py",
        "host_buffers.py",
        "step_executor.py",
        "step_shape.py",
        "kv_cache.py",
    )
    while came_so_far:
        decoder = Decoder(Toy())
        held.append(decoder)  # or one would be freed, and that interrupted, while another is tried
        sequence = begun(decoder, [3, 4], 6, ())
        came_so_far = interrupted(decoder.step, number, files)
        while sequence.finish_reason is None:
            decoder.step()
        assert sequence.answer == wanted, number
        number += 1
    assert number > 60


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (RuntimeError("CUDNN_STATUS_EXECUTION_FAILED"), BackendError),
        (RuntimeError("Failed to allocate memory for requested buffer of size 99"), CapacityError),
    ],
)
def test_a_library_failure_is_reported_and_costs_no_token(failure: Exception, kind: type[MedusaError]) -> None:
    decoder = Decoder(toy := Toy())
    sequence = begun(decoder, [3, 4], 6, ())
    for toy.failure, toy.refusal in ((None, failure), (failure, None)):
        with pytest.raises(kind, match=r"toy failed in a step of 1 tokens behind 2 in fp32: .*; expected"):
            decoder.step()
    toy.failure = None
    while sequence.finish_reason is None:
        decoder.step()
    assert sequence.answer == answer(Decoder(Toy()))


def test_results_belong_to_the_thread_that_ran_the_step() -> None:
    toy = Toy()
    cache = KvCache(toy)
    toy.run(literal([3, 4]))
    of_row = partial(toy.read_logits, 0), partial(toy.read_summary, 0)
    readers = (toy.read_argmax, toy.read_tokens, *of_row, toy.read_outputs)
    for work in (*readers, partial(cache.commit, [0])):
        assert isinstance(elsewhere(work), BusyError)
    cache.commit([0, 1])
    assert elsewhere(lambda: (toy.run(literal([5], 2)), toy.read_argmax())[1]) == [expected([3, 4, 5])]
    with pytest.raises(BusyError, match="the last step of toy was run by another thread, expected"):
        toy.read_argmax()


def test_a_library_with_state_per_thread_refuses_a_second_thread() -> None:
    toy = Toy()
    toy.in_one_thread = True
    decoder = Decoder(toy)
    elsewhere(lambda: decoder.cache.reserve(3))  # memory belongs to no thread
    wanted = answer(decoder)
    refused = elsewhere(lambda: decoder.start([3], 2))
    assert isinstance(refused, WrongThreadError)
    assert "was asked for a step in thread 'second', expected 'MainThread', which ran the first" in str(refused)
    assert isinstance(elsewhere(decoder.warm_up), WrongThreadError)
    assert answer(decoder) == wanted


def test_bindings_are_freed_before_sessions_and_sessions_before_the_device() -> None:
    gone: list[str] = []

    class Reporting:
        def __init__(self, name: str) -> None:
            self.name = name

        def __del__(self) -> None:
            gone.append(self.name)

    class WithSession(Toy):
        def _unload(self) -> None:
            vars(self).pop("session", None)

    toy = WithSession()
    toy._device.last = Reporting("device")  # type: ignore[attr-defined]
    toy.session = Reporting("session")  # type: ignore[attr-defined]
    toy.allocate(1, 8)
    toy.run(literal([3, 4]))
    toy._last_run().binding.runner.graph = Reporting("graph")  # type: ignore[attr-defined]
    del toy
    gc.collect()
    assert gone == ["graph", "session", "device"]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("arena", [LayerMajorArena, TokenMajorArena])
def test_a_copy_of_a_past_brings_its_rows_back(arena: Any, batch: int) -> None:
    toy = Toy(LayerMajorArena)  # the toy model reads this layout …
    toy._new_arena = arena
    cache, tokens, last = KvCache(toy, batch), list(range(3, 33)), batch - 1
    if arena is LayerMajorArena:
        toy.run(literal(tokens, 0, batch))
        cache.commit(range(30), last)
    else:  # … and rows of the other one are written by hand
        cache._lengths[last] = 30
    memory = toy._allocated().memory
    past = memory.arena._past.array  # type: ignore[attr-defined]
    if arena is TokenMajorArena:
        past[:] = np.random.default_rng(1).integers(256, size=past.size)
    before, free = past.copy(), len(toy.device.asked)
    saved = cache.save(25, last)
    assert toy.device.asked[free:] == [25 * toy.past_row_bytes] == [25 * cache.row_bytes]
    past[:] = 0
    cache.restore(saved, 25, last)
    assert (cache.length(last), cache.can_draft(last)) == (25, False)
    row = toy.past_row_bytes if arena is TokenMajorArena else toy.past_row_bytes // 2
    kept, expected = (
        rows.reshape(-1, batch, memory.arena.capacity * row)[:, last, : 25 * row] for rows in (past, before)
    )
    np.testing.assert_array_equal(kept, expected)
    if arena is LayerMajorArena and batch == 1:
        toy.run(literal([9], 25))
        assert toy.read_argmax() == [sum([7, *tokens[:25], 9]) % VOCAB]


def test_copies_are_bounded_by_what_is_free_and_refused_without_memory() -> None:
    toy = Toy()
    with pytest.raises(RuntimeError, match="before allocate"):
        toy.save_past(1)
    cache = KvCache(toy)
    assert toy.default_prefix_bytes() == 1 << 30
    toy.device.free = 4000
    assert toy.default_prefix_bytes() == 1000
    toy.run(literal([3, 4, 5]))
    cache.commit(range(3))
    with pytest.raises(RuntimeError, match=rf"got 0 rows to copy, expected 1 to {MODEL.context}"):
        toy.save_past(0)
    toy.device.fails = len(toy.device.asked)
    with pytest.raises(CapacityError):
        cache.save(3)
    saved = cache.save(3)
    with pytest.raises(RuntimeError, match="got 4 rows to restore, expected at most 3"):
        toy.restore_past(saved, 4)
    assert cache.length() == 3
