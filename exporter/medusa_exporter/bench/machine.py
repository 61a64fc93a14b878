"""Describes the machine and the package versions of a measurement."""

from __future__ import annotations

import os
import platform
from typing import Any

from medusa_runtime.threads import default_threads, physical_cores, processor_name

from medusa_exporter.package_versions import installed_versions

PACKAGES = (
    "medusa-export",
    "numpy",
    "tokenizers",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13-libs",
    "cuda-bindings",
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
)


def describe_machine(threads: int | None) -> dict[str, Any]:
    """Describe processor and operating system; `threads` is the requested number, None for the default."""
    return {
        "cpu": processor_name(),
        "cores": physical_cores(),
        "processors": os.cpu_count(),
        "threads": threads or default_threads(),
        "platform": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that affect bundle and speed."""
    return {"python": platform.python_version(), **installed_versions(PACKAGES)}
