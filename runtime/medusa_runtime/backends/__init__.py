"""Backends run the graph's steps; nothing outside a backend's module asks which one it has."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING

from medusa_runtime.arguments import optional_number, optional_text, text, whole_number
from medusa_runtime.backends.base import Backend, Step
from medusa_runtime.errors import BundleError

if TYPE_CHECKING:
    from medusa_runtime.bundle import Bundle

BACKENDS = {  # name -> the module whose `load` makes it
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
) -> Backend:
    """Load a bundle's graph for one backend.

    `precision` may be None where the bundle holds one; `threads` None means `threads.default_threads`; `max_length`:
    tokens that a sequence may come to, for which a GPU's memory is laid out, None for the model's context; `gpu`: the
    number of the GPU, from 0, as the CUDA driver counts them; it means nothing to a CPU. Raises BundleError for a
    backend or precision that the bundle lacks, ArgumentError for an argument of another type or out of its range,
    MissingExtraError where the library that runs it is not installed, CapacityError where memory does not suffice,
    MedusaError for a GPU that does not exist.
    """
    if text("backend", name) not in BACKENDS:
        raise BundleError(f"unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    optional_text("precision", precision)
    threads = optional_number("threads", threads, 1)
    limit = optional_number("max_length", max_length, 1)
    gpu = whole_number("gpu", gpu, 0)
    model = replace(bundle.model, context=min(limit or bundle.model.context, bundle.model.context))
    backend: Backend = importlib.import_module(BACKENDS[name]).load(bundle, model, name, precision, threads, gpu)
    return backend


__all__ = ["BACKENDS", "Backend", "Step", "load_backend"]
