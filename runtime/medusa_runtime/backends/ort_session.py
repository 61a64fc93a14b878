"""Sessions of ONNX Runtime: loaded from checked bytes only, and their inputs and outputs compared with the contract."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medusa_runtime.backends.checked_graph import CheckedGraph
from medusa_runtime.contract import TensorSpec
from medusa_runtime.errors import BundleError

BFLOAT16 = 16  # ONNX's number of the one type that numpy lacks
_ORT_TYPES = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16", "int32": "int32", "bool": "bool"}


def open_session(
    onnxruntime: Any, graph: CheckedGraph, options: Any, providers: list[Any], *, map_weights: bool = False
) -> Any:
    """Load a graph into a session.

    ONNX Runtime opens no file: it gets the graph as bytes and the external weights as tensors over the mapped files, of
    which it makes its own copies, plain or packed for its kernels; with `map_weights` packed ones only.

    Args:
        onnxruntime: The module.
        graph: The graph.
        options: Its `SessionOptions`; entries are added.
        providers: Its execution providers, in order of preference.
        map_weights: Whether the session reads weights that it does not pack from the mapped files.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        BundleError: ONNX Runtime cannot load the graph, or a file was changed meanwhile.
    """
    options.log_severity_level = 3
    options.add_session_config_entry("session.load_model_format", "ONNX")  # its own format was not checked
    with graph.mapped() as weights:
        values = [
            onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
            if weight.onnx_type == BFLOAT16
            else onnxruntime.OrtValue.ortvalue_from_numpy(array)
            for weight, array in weights.values()
        ]
        try:
            options.add_external_initializers(list(weights), values)  # it folds constants with these
            if map_weights:
                for name, value in zip(weights, values, strict=True):
                    options.add_initializer(name, value)
            session = onnxruntime.InferenceSession(graph.data, options, providers=providers)
        except Exception as error:  # the library raises many kinds
            raise BundleError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {graph.path}: {error}; build the bundle again, or "
                "install another version of ONNX Runtime"
            ) from error
        session.weights = weights, values  # keeps the files mapped, whether or not ONNX Runtime copied every weight
    return session


def check_signature(session: Any, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], graph: Path) -> None:
    """Check that a session has exactly the expected inputs and outputs.

    Args:
        session: The session.
        inputs: Expected inputs.
        outputs: Expected outputs.
        graph: The graph's file, for the message.

    Raises:
        BundleError: An input or output is missing, unexpected, or has another type or shape; names the first one.
    """
    for kind, tensors, specs in (("input", session.get_inputs(), inputs), ("output", session.get_outputs(), outputs)):
        expected = {spec.name: spec for spec in specs}
        found = {tensor.name: tensor for tensor in tensors}
        if names := sorted(expected.keys() ^ found.keys()):
            verb = "lacks" if names[0] in expected else "has"
            raise BundleError(
                f"{graph} {verb} the {kind} {names[0]!r:.80}, expected {', '.join(list(expected)[:6])} …; "
                "build it again"
            )
        for name, tensor in found.items():
            _check_tensor(tensor, expected[name], f"{graph}: the {kind} {name!r}")


def _check_tensor(tensor: Any, spec: TensorSpec, what: str) -> None:
    shape = tuple(tensor.shape or spec.shape)  # an output may have no shape; it is checked when a step is bound
    same = len(shape) == len(spec.shape) and all(
        size == expected
        for size, expected in zip(shape, spec.shape, strict=False)
        if isinstance(size, int) and isinstance(expected, int)  # others are symbolic
    )
    ort_type = f"tensor({_ORT_TYPES[spec.dtype]})"
    if tensor.type != ort_type or not same:
        raise BundleError(
            f"{what} is a {tensor.type} of {list(shape)}, expected a {ort_type} of {list(spec.shape)}; build it again"
        )
