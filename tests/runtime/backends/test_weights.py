"""Bytes of weights, counted in the file of the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from medusa_runtime.backends.weights import weight_bytes
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import BundleError
from onnx import numpy_helper


def tensor(name: str, place: tuple[str, int, int]) -> onnx.TensorProto:
    """A tensor that lies elsewhere: file, offset, length."""
    made = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=[place[2] // 4])
    made.data_location = onnx.TensorProto.EXTERNAL
    for key, value in zip(("location", "offset", "length"), place, strict=True):
        made.external_data.add(key=key, value=str(value))
    return made


def model(*tensors: onnx.TensorProto) -> bytes:
    graph = onnx.helper.make_graph([], "g", [], [], initializer=tensors)
    return onnx.helper.make_model(graph, producer_name="x" * 300).SerializeToString()


def test_weights_inside_and_beside_the_file_are_counted_each_place_once(tmp_path: Path) -> None:
    file = tmp_path / "graph.onnx"
    inside = numpy_helper.from_array(np.zeros((3, 5), np.float32), "inside")
    a, same, b = (tensor(name, ("shared.data", at, size)) for name, at, size in (
        ("a", 0, 400), ("same", 0, 400), ("b", 400, 1200),
    ))  # fmt: skip
    file.write_bytes(model(inside, a, same, b, tensor("c", ("other.data", 0, 40))))
    assert weight_bytes(file) == 60 + 400 + 1200 + 40
    file.write_bytes(model())
    assert weight_bytes(file) == 0


def test_a_shared_file_counts_only_as_far_as_a_graph_refers_to_it(tiny_precisions: Path) -> None:
    bundle = Bundle.open(tiny_precisions)
    for precision in ("fp32", "int8", "int4"):
        path = bundle.graph("ort-cpu", precision)[1]
        own = onnx.load(path, load_external_data=False).graph.initializer
        places = {place(one): one for one in own}
        assert weight_bytes(path) == sum(size(one) for one in places.values())
    sizes = [weight_bytes(bundle.graph("ort-cpu", precision)[1]) for precision in ("fp32", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)


def place(one: onnx.TensorProto) -> tuple[str, ...]:
    found = {entry.key: entry.value for entry in one.external_data}
    return (found["location"], found.get("offset", "0")) if found else (one.name,)


def size(one: onnx.TensorProto) -> int:
    found = {entry.key: entry.value for entry in one.external_data}
    return int(found["length"]) if found else len(one.raw_data)


@pytest.mark.parametrize("cut", [-1, 700])
def test_a_broken_file_is_told(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "graph.onnx"
    whole = model(numpy_helper.from_array(np.zeros(200, np.float32), "w"))
    file.write_bytes(whole[:cut])
    with pytest.raises(BundleError, match="is no ONNX graph whose weights can be counted"):
        weight_bytes(file)
    file.write_bytes(b"not a graph")
    with pytest.raises(BundleError, match="no ONNX graph"):
        weight_bytes(file)
