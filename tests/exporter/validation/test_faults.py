"""A graph that computes another model is refused, and the message names where it begins."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from medusa_exporter.validation.errors import GraphMismatchError
from onnx import NodeProto, numpy_helper

Change = Callable[[onnx.ModelProto], None]


def nodes(model: onnx.ModelProto, *kinds: str) -> list[NodeProto]:
    found = [node for node in model.graph.node if node.op_type in kinds]
    assert found, kinds
    return found


def set_weight(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for at, tensor in enumerate(model.graph.initializer):
        if tensor.name == name:
            array = change(numpy_helper.to_array(tensor).copy())
            model.graph.initializer[at].CopyFrom(numpy_helper.from_array(np.asarray(array, order="C"), name))
            return
    raise AssertionError(f"no initializer {name}")


def attribute(node: NodeProto, name: str) -> onnx.AttributeProto:
    return next(one for one in node.attribute if one.name == name)


def branch(node: NodeProto) -> list[str]:
    """The operators of an If's first branch."""
    return [one.op_type for one in attribute(node, "then_branch").g.node]


def through_shapes(model: onnx.ModelProto, node: NodeProto, *, forward: bool) -> NodeProto:
    """The next node before or behind one whose rows are not just selected and reshaped."""
    while True:
        if forward:
            [node] = [other for other in model.graph.node if other.input[0] == node.output[0]]
        else:
            [node] = [other for other in model.graph.node if node.input[0] in other.output]
        if node.op_type not in ("Reshape", "Gather"):
            return node


def one_layers_weight(layer: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        attention = [node for node in nodes(model, "If") if "GroupQueryAttention" in branch(node)]
        product = through_shapes(model, attention[layer], forward=True)
        assert product.op_type == "MatMul"
        set_weight(model, product.input[1], lambda array: array * np.float32(1.01))

    return change


def a_sign_in_rope(model: onnx.ModelProto) -> None:
    set_weight(model, "in_place.sin", lambda table: -table)


def one_position_of_rope(at: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        def moved(table: np.ndarray) -> np.ndarray:
            table[at] = table[at - 1]
            return table

        for name in ("in_place.sin", "in_place.cos"):
            set_weight(model, name, moved)

    return change


def a_mask_of_rows_in_order(model: onnx.ModelProto) -> None:
    """Each node of a tree sees all nodes before it, as the tokens of a prompt do."""
    for node in model.graph.node:
        node.input[:] = ["rows_in_order" if name == "tree_mask" else name for name in node.input]
    make = onnx.helper.make_node
    for node in (
        make("Trilu", ["all_rows"], ["rows_in_order"], upper=0),
        make("Or", ["tree_mask", "no_rows"], ["all_rows"]),
        make("Not", ["tree_mask"], ["no_rows"]),
    ):
        model.graph.node.insert(0, node)


def another_epsilon(model: onnx.ModelProto) -> None:
    for node in nodes(model, "RMSNormalization", "SimplifiedLayerNormalization")[:1]:
        attribute(node, "epsilon").f = 1e-2


def no_window(model: onnx.ModelProto) -> None:
    """Rows are near enough however far back they lie."""
    [less] = [node for node in nodes(model, "Less") if node.input[1] in sizes(model, 7)]
    set_weight(model, less.input[1], lambda _array: np.array(1000, _array.dtype).reshape(_array.shape))


def sizes(model: onnx.ModelProto, value: int) -> set[str]:
    """Names of the constants that are this number alone."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {name for name, array in arrays.items() if array.size == 1 and int(array.reshape(())) == value}


def swapped_kv_heads(model: onnx.ModelProto) -> None:
    """The two value heads of the last layer change places, in the projection of all three."""
    product = through_shapes(model, nodes(model, "RotaryEmbedding", "GroupQueryAttention")[-1], forward=False)
    assert product.op_type == "MatMul"  # queries, keys and values are one product
    start = (4 + 2) * 16

    def swapped(array: np.ndarray) -> np.ndarray:
        own = array[:, start : start + 32].copy()
        array[:, start : start + 32] = np.concatenate((own[:, 16:], own[:, :16]), axis=1)
        return array

    set_weight(model, product.input[1], swapped)


FAULTS: dict[str, tuple[Change, str]] = {
    "first layer's weight": (one_layers_weight(0), r"prefill step the keys of layer 1 \(.*the output of layer 0\)"),
    "last layer's weight": (one_layers_weight(1), "prefill step the hidden state after layer 1, the last"),
    "a sign in rope": (a_sign_in_rope, "prefill step the keys of layer 0"),
    "rope at the last position": (one_position_of_rope(127), "rope step the keys of layer 0"),
    "mask": (a_mask_of_rows_in_order, "tree step the keys of layer 1"),
    "epsilon": (another_epsilon, "prefill step the keys of layer 0"),
    "window": (no_window, "prefill step the keys of layer 1"),
    "kv heads": (swapped_kv_heads, "prefill step the values of layer 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_fp32_graph_is_refused_where_it_begins(changed, fault: str) -> None:
    graph = changed("ort-cpu", "fp32")
    change, where = FAULTS[fault]
    change(graph.model)
    with pytest.raises(
        GraphMismatchError, match=rf"ort-cpu-fp32\.onnx differs from the model: in its {where}"
    ) as caught:
        graph.check()
    found = re.search(r"differ by (\S+) at most, expected (\S+);", str(caught.value))
    assert found and float(found[1]) > float(found[2]) == 5e-5


def test_the_same_graph_unchanged_passes(changed) -> None:
    assert changed("ort-cpu", "fp32").check().differs_by < 2e-6


@pytest.mark.parametrize("fault", ["a sign in rope", "kv heads"])
@pytest.mark.parametrize(("backend", "precision"), [("ort-cuda", "fp16")])
def test_in_fewer_bits_too(changed, backend: str, precision: str, fault: str) -> None:
    graph = changed(backend, precision)
    change, where = FAULTS[fault]
    change(graph.model)
    with pytest.raises(GraphMismatchError, match=where):
        graph.check()


@pytest.mark.parametrize("fault", ["a sign in rope", "epsilon"])
@pytest.mark.parametrize("precision", ["int8", "w8a8", "int4"])
def test_in_quantised_graphs_the_first_layer_tells(changed, precision: str, fault: str) -> None:
    graph = changed("ort-cpu", precision)
    change, where = FAULTS[fault]
    change(graph.model)
    with pytest.raises(GraphMismatchError, match=where):
        graph.check()


def test_heads_that_propose_something_else_are_refused(changed) -> None:
    graph = changed("ort-cuda", "fp32")
    topk = nodes(graph.model, "TopK")[0]
    attribute_of = [one for one in topk.attribute if one.name == "largest"]
    if attribute_of:
        attribute_of[0].i = 0
    else:
        topk.attribute.append(onnx.helper.make_attribute("largest", 0))
    with pytest.raises(GraphMismatchError, match="draft step the candidates of the heads"):
        graph.check()


def test_an_argmax_of_its_own_is_refused(changed) -> None:
    graph = changed("ort-cpu", "fp32")
    argmax = nodes(graph.model, "ArgMax")[0]
    argmax.op_type = "ArgMin"
    with pytest.raises(GraphMismatchError, match="most likely token, after all layers differ by inf"):
        graph.check()


def the_least_tokens(model: onnx.ModelProto) -> None:
    attribute(nodes(model, "TopK")[-1], "largest").i = 0


def no_row_is_finite(model: onnx.ModelProto) -> None:
    [less] = [node for node in nodes(model, "Less") if "finite" in node.output]
    less.op_type = "Greater"


def a_sum_without_exponentials(model: onnx.ModelProto) -> None:
    nodes(model, "Exp")[-1].op_type = "Abs"


def the_first_row_alone(model: onnx.ModelProto) -> None:
    """The graph summarises rows in their own order, whatever `summary_rows` says."""
    for node in model.graph.node:
        node.input[:] = ["own_order" if name == "summary_rows" else name for name in node.input]
    zero = onnx.helper.make_tensor("own_zero", onnx.TensorProto.INT32, [], [0])
    model.graph.initializer.append(zero)
    model.graph.node.insert(0, onnx.helper.make_node("Mul", ["summary_rows", "own_zero"], ["own_order"]))


@pytest.mark.parametrize(
    "change", [the_least_tokens, no_row_is_finite, a_sum_without_exponentials, the_first_row_alone]
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_summaries_of_other_rows_than_the_graphs_own_are_refused(changed, change: Change, precision: str) -> None:
    graph = changed("ort-cuda", precision)
    change(graph.model)
    with pytest.raises(GraphMismatchError, match="prefill step the summaries of rows and the graph's own logits"):
        graph.check()
