"""Sessions of ONNX Runtime on the CPU, with the options that decoding needs."""

from __future__ import annotations

from typing import Any

from medusa_runtime.backends.checked_graph import CheckedGraph
from medusa_runtime.backends.integer_products import set_exact_products
from medusa_runtime.backends.ort_library import import_onnxruntime
from medusa_runtime.backends.ort_session import open_session


def open_cpu_session(graph: CheckedGraph, threads: int, map_weights: bool) -> Any:
    """Load a graph into a session on the CPU.

    Args:
        graph: The graph.
        threads: Number of threads.
        map_weights: Whether weights are read from the mapped files where ONNX Runtime does not repack them.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        BundleError: The graph cannot be loaded.
        MissingExtraError: ONNX Runtime is not installed or too old.
    """
    onnxruntime = import_onnxruntime("cpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # otherwise a memory pattern is stored for every length of the past
    # Threads that wait for work spin. Within a step that makes it fast; after the step they would take processor time
    # from other sessions of the process (two that alternate ran half as fast).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    set_exact_products(onnxruntime, options)
    return open_session(onnxruntime, graph, options, ["CPUExecutionProvider"], map_weights=map_weights)
