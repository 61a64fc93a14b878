"""Host buffers: steps are padded to the shape that they run in."""

from __future__ import annotations

import numpy as np
from medusa_runtime.backends.base import Step
from medusa_runtime.backends.host_buffers import ALIGNMENT, HostBuffers
from medusa_runtime.backends.step_shape import StepShape

from .host_device import HostDevice


def test_a_smaller_step_is_padded_by_nodes_that_see_only_themselves() -> None:
    buffers = HostBuffers(HostDevice(), StepShape(1, 4, 3, draft=True, P=256))
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
    assert len(set(addresses)) == 7


def test_steps_leave_no_trace_in_later_ones() -> None:
    rng, buffers = np.random.default_rng(2), HostBuffers(HostDevice(), StepShape(1, 6, 6, draft=True, P=256))
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
        fresh = HostBuffers(HostDevice(), StepShape(1, 6, 6, draft=True, P=256))
        fresh.write(step)
        for one, other in zip(buffers._input_arrays, fresh._input_arrays, strict=True):
            np.testing.assert_array_equal(one, other)
        assert buffers.sizes == (nodes, nodes)
