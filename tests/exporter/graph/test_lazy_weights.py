"""Lazy weights have the same values whether they are read as a whole or in parts."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from medusa_exporter.graph.lazy_weights import ConcatenatedColumns, SelectedRows


def test_rows_are_selected_in_the_order_of_the_indices() -> None:
    weight, picked = torch.randn(9, 4), torch.tensor([7, 0, 3, 3])
    rows = SelectedRows(weight, picked, "rows")
    assert (rows.name, rows.shape.numpy(), rows.dtype) == ("rows", (4, 4), ir.DataType.FLOAT)
    np.testing.assert_array_equal(rows.numpy(), weight[picked].numpy())
    np.testing.assert_array_equal(rows.rows(slice(1, 3)), weight[picked[1:3]].numpy())


@pytest.mark.parametrize("some", [slice(None), slice(0, 2), slice(2, 5), slice(1, 7), slice(5, 9), slice(6, 100)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_columns_of_concatenated_tensors(some: slice, dtype: type) -> None:
    parts = [np.random.default_rng(width).normal(size=(3, width)).astype(dtype) for width in (2, 1, 5)]
    joined = ConcatenatedColumns([ir.tensor(part) for part in parts], "joined")
    whole = np.concatenate(parts, axis=-1)
    assert (joined.name, joined.shape.numpy(), joined.dtype.numpy()) == ("joined", (3, 8), dtype)
    np.testing.assert_array_equal(joined.numpy(), whole)
    np.testing.assert_array_equal(joined.columns(some), whole[:, some])
