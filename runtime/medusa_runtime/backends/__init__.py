"""Backends: the libraries that can run a graph's steps, all behind the same protocol (`Backend`)."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING

from medusa_runtime.arguments import as_bool, as_int, as_optional_int, as_optional_text, as_text
from medusa_runtime.backends.base import Backend, RowSummary, Step
from medusa_runtime.errors import BundleError

if TYPE_CHECKING:
    from medusa_runtime.bundle import Bundle

BACKENDS = {  # name -> the module whose `load` loads it
    "ort-cpu": "medusa_runtime.backends.ort_cpu",
    "ort-cuda": "medusa_runtime.backends.ort_cuda",
    "tensorrt": "medusa_runtime.backends.tensorrt",
    "tensorrt-rtx": "medusa_runtime.backends.tensorrt",
}


def load_backend(
    bundle: Bundle,
    name: str = "ort-cpu",
    precision: str | None = None,
    threads: int | None = None,
    max_length: int | None = None,
    gpu: int = 0,
    map_weights: bool = False,
) -> Backend:
    """Load a bundle's graph for one backend.

    Args:
        bundle: The bundle.
        name: Name of the backend, one of `BACKENDS`.
        precision: Precision of the graph; may be None where the bundle has only one for this backend.
        threads: Number of CPU threads; None for `medusa_runtime.threads.default_threads`. Ignored on a GPU.
        max_length: Tokens of a sequence at most, prompt included; a GPU backend allocates its KV cache for it. None
            for the model's context.
        gpu: Number of the GPU, from 0, in the order of the CUDA driver. Ignored on a CPU.
        map_weights: Read the weights that ONNX Runtime does not repack from the mapped files instead of from a copy:
            less memory, which processes share, but the files must not be written to while the backend lives, since
            that would change its answers. Ignored on a GPU.

    Raises:
        BundleError: The backend is unknown, or the bundle has no graph for it in this precision.
        ArgumentError: An argument has the wrong type or is out of range.
        MissingExtraError: The library that runs it is not installed.
        CapacityError: The memory is too small.
        MedusaError: The GPU does not exist.
    """
    if as_text("backend", name) not in BACKENDS:
        raise BundleError(f"unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    as_optional_text("precision", precision)
    threads = as_optional_int("threads", threads, 1)
    limit = as_optional_int("max_length", max_length, 1)
    gpu = as_int("gpu", gpu, 0)
    model = replace(bundle.model, context=min(limit or bundle.model.context, bundle.model.context))
    load = importlib.import_module(BACKENDS[name]).load
    backend: Backend = load(bundle, model, name, precision, threads, gpu, as_bool("map_weights", map_weights))
    return backend


__all__ = ["BACKENDS", "Backend", "RowSummary", "Step", "load_backend"]
