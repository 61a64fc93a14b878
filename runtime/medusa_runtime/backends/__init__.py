"""Backends run the graph's steps; nothing outside a backend's module asks which one it has."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from medusa_runtime.backends.base import Backend, Step
from medusa_runtime.errors import BundleError

if TYPE_CHECKING:
    from medusa_runtime.bundle import Bundle

BACKENDS = {  # name -> the module whose `load` makes it
    "ort-cpu": "medusa_runtime.backends.ort",
    "ort-cuda": "medusa_runtime.backends.ort_cuda",
    "tensorrt": "medusa_runtime.backends.tensorrt",
    "tensorrt-rtx": "medusa_runtime.backends.tensorrt",
}


def load_backend(
    bundle: Bundle, name: str = "ort-cpu", precision: str | None = None, threads: int | None = None
) -> Backend:
    """Load a bundle's graph for one backend.

    `precision` may be None where the bundle holds one; `threads` None means `threads.default_threads`. Raises
    BundleError for a backend or precision that the bundle lacks, MissingExtraError where the library that runs it is
    not installed.
    """
    if name not in BACKENDS:
        raise BundleError(f"unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    backend: Backend = importlib.import_module(BACKENDS[name]).load(bundle, name, precision, threads)
    return backend


__all__ = ["BACKENDS", "Backend", "Step", "load_backend"]
