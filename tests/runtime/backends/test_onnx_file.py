"""Reading ONNX files: weights and operators are found, and references to other files are checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from medusa_runtime.backends.onnx_file import ExternalData, read_contents
from medusa_runtime.errors import BundleError
from onnx import TensorProto, helper, numpy_helper


def tensor(name: str, place: tuple[str, int, int]) -> TensorProto:
    """A tensor with external data: file, offset, length."""
    made = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[place[2] // 4])
    made.data_location = TensorProto.EXTERNAL
    for key, value in zip(("location", "offset", "length"), place, strict=True):
        made.external_data.add(key=key, value=str(value))
    return made


def model(*tensors: TensorProto, nodes: tuple[onnx.NodeProto, ...] = ()) -> bytes:
    graph = helper.make_graph(nodes, "g", [], [], initializer=tensors)
    return helper.make_model(graph, producer_name="x" * 300).SerializeToString()


def test_weights_and_operators() -> None:
    inside = numpy_helper.from_array(np.zeros((3, 5), np.float32), "inside")
    nodes = (helper.make_node("Add", ["a", "b"], ["c"]), helper.make_node("Other", [], [], domain="com.example"))
    found = read_contents(model(inside, tensor("a", ("shared.data", 8, 400)), nodes=nodes), "g.onnx")
    assert found.operators == {("", "Add"), ("com.example", "Other")}
    assert [(one.name, one.onnx_type, one.shape, one.external, one.inline_bytes) for one in found.weights] == [
        ("inside", 1, (3, 5), None, 60),
        ("a", 1, (100,), ExternalData("shared.data", 8, 400), 0),
    ]


@pytest.mark.parametrize("cut", [-1, 700])
def test_a_broken_file(cut: int) -> None:
    whole = model(numpy_helper.from_array(np.zeros(200, np.float32), "w"))
    for data in (whole[:cut], b"not a graph", b"\x3a" + b"\xff" * 10**6):
        with pytest.raises(BundleError, match=r"g\.onnx is not a valid ONNX graph"):
            read_contents(data, "g.onnx")


@pytest.mark.parametrize(
    "place",
    [
        ("../outside.data", 0, 400),
        ("/etc/passwd", 0, 400),
        ("sub/shared.data", 0, 400),
        ("..\\outside.data", 0, 400),
        ("c:shared.data", 0, 400),
        ("", 0, 400),
        ("..", 0, 400),
        ("shared.data", -8, 400),
        ("shared.data", 0, -400),
        ("shared.data", 10**30, 400),
    ],
)
def test_external_data_outside_the_folder_is_refused(place: tuple[str, int, int]) -> None:
    with pytest.raises(BundleError, match=r"expected a file next to the ONNX file|is not a whole number"):
        read_contents(model(tensor("w", place)), "g.onnx")


def test_duplicate_entries_are_refused() -> None:
    twice = tensor("w", ("shared.data", 0, 400))
    twice.external_data.add(key="location", value="other.data")
    with pytest.raises(BundleError, match="two entries 'location'"):
        read_contents(model(twice), "g.onnx")
    same = tensor("w", ("shared.data", 0, 400))
    with pytest.raises(BundleError, match="two weights have the name 'w'"):
        read_contents(model(same, same), "g.onnx")


OUTSIDE = tensor("secret", ("secret.data", 0, 400))


def constant() -> bytes:
    return model(nodes=(helper.make_node("Constant", [], ["c"], value=OUTSIDE),))


def subgraph() -> bytes:
    branch = helper.make_graph([], "branch", [], [], initializer=[OUTSIDE])
    return model(nodes=(helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch),))


def sparse() -> bytes:
    graph = helper.make_graph([], "g", [], [])
    graph.sparse_initializer.add(values=OUTSIDE, dims=[100])
    return helper.make_model(graph).SerializeToString()


def function() -> bytes:
    made = onnx.load_from_string(model())
    made.functions.add(name="f", domain="d", node=[helper.make_node("Constant", [], ["c"], value=OUTSIDE)])
    return made.SerializeToString()


def training() -> bytes:
    made = onnx.load_from_string(model())
    made.training_info.add(algorithm=helper.make_graph([], "g", [], [], initializer=[OUTSIDE]))
    return made.SerializeToString()


@pytest.mark.parametrize("hidden", [constant, subgraph, sparse, function, training])
def test_external_data_of_other_tensors_is_refused(hidden) -> None:
    with pytest.raises(BundleError, match=r"'secret' is stored at .*expected it in the ONNX file"):
        read_contents(hidden(), "g.onnx")


def test_deep_nesting_is_refused() -> None:
    message = b""
    for field in [6, 5, 1] * 400:  # a graph in an attribute in a node in a graph, …
        message = bytes([field << 3 | 2]) + varint(len(message)) + message
    with pytest.raises(BundleError, match="nested more than 100 deep"):
        read_contents(b"\x3a" + varint(len(message)) + message, "g.onnx")


def varint(value: int) -> bytes:
    """Encode a varint."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def test_a_bundles_graphs_are_read(tiny_precisions: Path) -> None:
    for path in (tiny_precisions / "graphs").glob("*.onnx"):
        own = onnx.load(path, load_external_data=False).graph
        found = read_contents(path.read_bytes(), str(path))
        assert [weight.name for weight in found.weights] == [one.name for one in own.initializer]
        assert {name for _, name in found.operators} == {node.op_type for node in nodes_of(own)}


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the branches of its Ifs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes_of(attribute.g)
