"""ONNX Runtime's session for a graph, made from bytes that were checked; what it says of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medusa_runtime.backends.checked_graph import CheckedGraph
from medusa_runtime.contract import TensorSpec
from medusa_runtime.errors import BundleError

BFLOAT16 = 16  # ONNX's number of the one type that numpy lacks
_KINDS = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16", "int32": "int32", "bool": "bool"}


def open_session(onnxruntime: Any, graph: CheckedGraph, options: Any, providers: list[Any]) -> Any:
    """Load a graph. Raises BundleError with the library's own words.

    ONNX Runtime opens no file: the graph is given as bytes, and the weights beside it as tensors over the mapped files,
    of which it makes its own copies, packed for its kernels or plain.
    """
    options.log_severity_level = 3
    options.add_session_config_entry("session.load_model_format", "ONNX")  # not its own format, which was not checked
    with graph.mapped() as weights:
        values = [
            onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
            if weight.dtype == BFLOAT16
            else onnxruntime.OrtValue.ortvalue_from_numpy(array)
            for weight, array in weights.values()
        ]
        try:
            options.add_external_initializers(list(weights), values)
            session = onnxruntime.InferenceSession(graph.data, options, providers=providers)
        except Exception as error:  # the library raises many kinds
            raise BundleError(f"ONNX Runtime {onnxruntime.__version__} cannot load {graph.path}: {error}") from error
        session.weights = weights  # mapped for as long as the session lives: whether it copies all is its own affair
    return session


def check_signature(session: Any, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], graph: Path) -> None:
    """Check that a session's inputs and outputs are these. Raises BundleError naming the first that is not."""
    for side, found, specs in (("input", session.get_inputs(), inputs), ("output", session.get_outputs(), outputs)):
        expected = {spec.name: spec for spec in specs}
        given = {tensor.name: tensor for tensor in found}
        if names := sorted(expected.keys() ^ given.keys()):
            here = "lacks" if names[0] in expected else "has"
            raise BundleError(
                f"{graph} {here} the {side} {names[0]!r:.80}, expected {', '.join(list(expected)[:6])} …; "
                "build it again"
            )
        for name, tensor in given.items():
            _check_tensor(tensor, expected[name], f"{graph}: the {side} {name!r}")


def _check_tensor(tensor: Any, spec: TensorSpec, what: str) -> None:
    shape = tuple(tensor.shape or spec.shape)  # outputs may have none, they are compared when a step is bound
    same = len(shape) == len(spec.shape) and all(
        got == wanted
        for got, wanted in zip(shape, spec.shape, strict=False)
        if isinstance(got, int) and isinstance(wanted, int)
    )
    kind = f"tensor({_KINDS[spec.dtype]})"
    if tensor.type != kind or not same:
        raise BundleError(
            f"{what} is a {tensor.type} of {list(shape)}, expected a {kind} of {list(spec.shape)}; build it again"
        )
