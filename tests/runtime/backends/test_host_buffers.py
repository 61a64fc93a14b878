"""Host buffers: steps are padded to the shape that they run in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from medusa_runtime import contract
from medusa_runtime.backends.base import RowSummary, Step, literal_step
from medusa_runtime.backends.host_buffers import ALIGNMENT, HostBuffers
from medusa_runtime.backends.step_shape import StepShape

from .fake_tensorrt import at
from .host_device import HostDevice


def test_a_smaller_step_is_padded_by_nodes_that_see_only_themselves() -> None:
    buffers = HostBuffers(HostDevice(), StepShape(1, 4, 3, draft=True, P=256, summaries=True), 99)
    step = Step(
        input_ids=np.array([[7, -1]], np.int32),
        position_ids=np.array([[5, 6]], np.int32),
        tree_mask=np.array([[[1, 0], [1, 1]]], np.bool_),
        past_length=np.array([5], np.int32),
        logit_rows=np.array([[1]], np.int32),
        draft=True,
    )
    buffers.write(step)
    ids, positions, mask, past_length, rows = buffers._input_arrays
    assert ids.tolist() == [[7, -1, 0, 0]]
    assert positions.tolist() == [[5, 6, 5, 5]]
    assert mask.astype(int).tolist() == [[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]
    assert (past_length.tolist(), rows.tolist()) == ([5], [[1, 0, 0]])
    buffers._block.array[:] = 1
    assert len(buffers.read_tokens(0)) == 2
    assert len(buffers.read_argmax(0)) == 1
    addresses = [tensor.address for tensor in (buffers.inputs | buffers.outputs).values()]
    assert all(address % ALIGNMENT == buffers._block.address % ALIGNMENT for address in addresses)
    assert len(set(addresses)) == 12


def test_steps_leave_no_trace_in_later_ones() -> None:
    rng, buffers = np.random.default_rng(2), HostBuffers(HostDevice(), StepShape(1, 6, 6, draft=True, P=256), 99)
    for nodes in (2, 2, 6, 2, 1, 1, 4, 6, 4):
        length = int(rng.integers(1, 50))
        step = Step(
            input_ids=rng.integers(1, 99, (1, nodes)).astype(np.int32),
            position_ids=rng.integers(length, 99, (1, nodes)).astype(np.int32),
            tree_mask=rng.integers(0, 2, (1, nodes, nodes)).astype(np.bool_),
            past_length=np.array([length], np.int32),
            logit_rows=rng.integers(0, nodes, (1, nodes)).astype(np.int32),
            draft=True,
        )
        buffers.write(step)
        fresh = HostBuffers(HostDevice(), StepShape(1, 6, 6, draft=True, P=256), 99)
        fresh.write(step)
        for one, other in zip(buffers._input_arrays, fresh._input_arrays, strict=True):
            np.testing.assert_array_equal(one, other)
        assert buffers.sizes == (nodes, nodes)


def test_the_summary_of_a_row_is_read_where_the_device_wrote_it() -> None:
    device, B, R, V = HostDevice(), 2, 3, 99
    buffers = HostBuffers(device, StepShape(B, 4, R, draft=False, P=256, summaries=True), V)
    rows = buffers.inputs[contract.SUMMARY_ROWS]
    assert at(rows.address, rows.shape, np.int32).tolist() == [[0, 1, 2]] * B
    written = {}
    for name, dtype in zip(contract.SUMMARY_OUTPUTS, (np.bool_, np.int32, np.float32, np.float32), strict=True):
        tensor = buffers.outputs[name]
        shape = (B, R, 64) if name in (contract.TOP_IDS, contract.TOP_LOGITS) else (B, R)
        assert tensor.shape == shape and tensor.address % 4 == 0
        written[name] = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
        at(tensor.address, shape, dtype)[...] = written[name]
    one = literal_step(np.array([4, 8], np.int32), 0, np.array([0, 1], np.int32), summaries=True)
    buffers.write(Step(**{name: np.repeat(value, B, 0) if isinstance(value, np.ndarray) else value
                          for name, value in vars(one).items()}))  # fmt: skip
    for sequence, row in ((0, 0), (1, 1)):
        found = buffers.read_summary(row, sequence)
        assert isinstance(found, RowSummary)
        for value, name in zip((found.finite, *found[:3]), contract.SUMMARY_OUTPUTS, strict=True):
            np.testing.assert_array_equal(value, written[name][sequence, row])
        assert (type(found.logsumexp), type(found.finite)) == (float, bool)
        assert buffers.read_finite(row, sequence) is found.finite
    buffers.write(replace(one, summaries=False))
    assert buffers.read_summary(0, 0) is None
    assert buffers.read_finite(1, 0) is True and buffers.read_finite(0, 0) is False


def test_a_shape_without_summaries_has_no_rows_of_them() -> None:
    buffers = HostBuffers(HostDevice(), StepShape(1, 4, 3, draft=False, P=256), 30)
    assert buffers.inputs[contract.SUMMARY_ROWS].shape == (1, 0)
    assert [buffers.outputs[name].shape for name in contract.SUMMARY_OUTPUTS] == [
        (1, 3),
        (1, 0, 30),
        (1, 0, 30),
        (1, 0),
    ]
