"""Measure the time of a tree's attention in ONNX Runtime on a GPU, in microseconds per layer.

    python benchmarks/attention.py --shape 135m --past 192,960,4032

The model is a chain of layers without feed-forward blocks (matrix multiplications, GroupQueryAttention with an in-place
KV cache, residual and norm) in fp16, run as a CUDA graph. Three cases are timed: one row, 64 causal rows, and 64 rows
under the mask of a tree. The causal rows need no mask, so the time that they take beyond one row is the part that a
faster mask cannot save.
"""

from __future__ import annotations

import argparse
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from medusa_runtime.backends.ort_library import import_onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

RUNS = 60
EPSILON = 1e-5
MASKED = -60000.0  # added to the attention score of a row that is not an ancestor


class Shape(NamedTuple):
    """Number of layers, and their sizes."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int


SHAPES = {"135m": Shape(30, 576, 9, 3, 64), "7b": Shape(4, 4096, 32, 32, 128)}


def main() -> None:
    """Parse the command line, measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m", help="Sizes of the layers (default: 135m).")
    parser.add_argument("--past", default="192,960,4032", help="Comma-separated KV cache lengths, in tokens.")
    parser.add_argument("--nodes", type=int, default=64, help="Nodes of the tree (default: 64).")
    parser.add_argument("--cpu", action="store_true", help="Run in fp32 on the CPU, to test the script.")
    options = parser.parse_args()
    print(f"{'past':>6}{'one row':>12}{'causal':>12}{'tree':>12}   us per layer, {options.nodes} rows")
    for past in map(int, options.past.split(",")):
        cases = ((1, False), (options.nodes, False), (options.nodes, True))
        spent = [
            layer_micros(SHAPES[options.shape], past, rows, masked=masked, cpu=options.cpu) for rows, masked in cases
        ]
        print(f"{past:6}" + "".join(f"{micros:12.1f}" for micros in spent), flush=True)


def layer_micros(shape: Shape, past: int, rows: int, *, masked: bool, cpu: bool) -> float:
    """Return the median time of a run, in microseconds per layer."""
    dtype = np.dtype(np.float32 if cpu else np.float16)
    session, io, buffers = open_session(shape, past, rows, masked=masked, dtype=dtype, device="cpu" if cpu else "cuda")
    seconds = []
    for number in range(RUNS + 3):  # the first runs choose kernels and capture the CUDA graph
        started = perf_counter()
        session.run_with_iobinding(io)
        if number >= 3:
            seconds.append(perf_counter() - started)
    assert buffers  # noqa: S101 -- the binding points at their memory
    return float(np.median(seconds)) * 1e6 / shape.layers


def open_session(
    shape: Shape, past: int, rows: int, *, masked: bool, dtype: np.dtype[Any], device: str
) -> tuple[Any, Any, list[Any]]:
    """Return a session, its binding, and the device buffers, which must live as long as the binding."""
    onnxruntime = import_onnxruntime("export" if device == "cpu" else "gpu")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if device == "cuda":
        onnxruntime.preload_dlls()
    providers = [("CUDAExecutionProvider", {"enable_cuda_graph": "1", "use_tf32": "0"}), "CPUExecutionProvider"]
    model = build_chain(shape, past, rows, masked=masked, dtype=dtype).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers[1:] if device == "cpu" else providers)
    io, buffers, rng = session.io_binding(), [], np.random.default_rng(0)

    def put(array: NDArray[Any]) -> Any:
        buffers.append(onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0))
        return buffers[-1]

    io.bind_ortvalue_input("x", put(rng.standard_normal((1, rows, shape.width)).astype(dtype)))
    io.bind_ortvalue_input("positions", put(np.arange(past, past + rows)[None]))
    if masked:
        bias = np.zeros((1, 1, rows, past + rows), dtype)
        bias[0, 0, :, past + 1 :] = np.where(np.eye(rows, dtype=np.bool_)[:, 1:], 0, MASKED)  # sees root and self
        io.bind_ortvalue_input("mask", put(bias))
    buffer = rng.standard_normal((1, shape.kv_heads, past + rows, shape.head_size)).astype(dtype)
    for layer in range(shape.layers):
        for name in ("key", "value"):
            value = put(buffer)
            io.bind_ortvalue_input(f"{name}{layer}", value)
            io.bind_ortvalue_output(f"new_{name}{layer}", value)
    io.bind_ortvalue_output("y", put(np.zeros((1, rows, shape.width), dtype)))
    return session, io, buffers


def build_chain(shape: Shape, past: int, rows: int, *, masked: bool, dtype: np.dtype[Any]) -> Any:
    """Return the ONNX model."""
    element = TensorProto.FLOAT16 if dtype.itemsize == 2 else TensorProto.FLOAT
    total, inner = past + rows, shape.heads * shape.head_size
    angles = np.arange(total)[:, None] / 10000 ** (np.arange(shape.head_size // 2) / (shape.head_size // 2))
    rng = np.random.default_rng(1)
    wide = (inner + 2 * shape.kv_heads * shape.head_size, inner)
    weights = [
        (rng.standard_normal(size, np.float32) / np.sqrt(size[0])).astype(dtype)
        for size in ((shape.width, wide[0]), (wide[1], shape.width))
    ]
    constants: dict[str, NDArray[Any]] = {
        "cos": np.cos(angles).astype(dtype),
        "sin": np.sin(angles).astype(dtype),
        "last": np.array([total - 1], np.int32),
        "total": np.array([total], np.int32),
        "gain": np.ones(shape.width, dtype),
    }

    def info(name: str, sizes: list[int], of: int = element) -> Any:
        return helper.make_tensor_value_info(name, of, sizes)

    inputs = [info("x", [1, rows, shape.width]), info("positions", [1, rows], TensorProto.INT64)]
    inputs += [info("mask", [1, 1, rows, total])] if masked else []
    outputs, nodes, stream = [info("y", [1, rows, shape.width])], [], "x"
    for layer in range(shape.layers):
        constants |= {f"in{layer}": weights[0], f"out{layer}": weights[1]}  # each layer has its own copy
        past_names = [f"key{layer}", f"value{layer}"]
        sizes = [1, shape.kv_heads, total, shape.head_size]
        inputs += [info(name, sizes) for name in past_names]
        outputs += [info(f"new_{name}", sizes) for name in past_names]
        attention_inputs = [f"qkv{layer}", "", "", *past_names, "last", "total", "cos", "sin", "positions"]
        nodes += [
            helper.make_node("MatMul", [stream, f"in{layer}"], [f"qkv{layer}"]),
            helper.make_node(
                "GroupQueryAttention",
                attention_inputs + (["mask"] if masked else []),
                [f"attended{layer}", *(f"new_{name}" for name in past_names)],
                domain="com.microsoft",
                num_heads=shape.heads,
                kv_num_heads=shape.kv_heads,
                do_rotary=1,
                scale=float(shape.head_size**-0.5),
            ),
            helper.make_node("MatMul", [f"attended{layer}", f"out{layer}"], [f"sum{layer}"]),
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [stream, f"sum{layer}", "gain"],
                ["y" if layer + 1 == shape.layers else f"x{layer}"],
                domain="com.microsoft",
                epsilon=EPSILON,
            ),
        ]
        stream = f"x{layer}"
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "chain", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


if __name__ == "__main__":
    main()
