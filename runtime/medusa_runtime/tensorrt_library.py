"""Finds the installed TensorRT: by the names that its packages import as."""

from __future__ import annotations

import importlib
from typing import Any

from medusa_runtime.errors import MissingExtraError

MODULES = {  # flavour -> what it imports as, as a whole or as bindings alone
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
MIN_VERSIONS = {"tensorrt": (8, 6), "tensorrt-rtx": (1, 0)}


def import_tensorrt(name: str) -> tuple[Any, str]:
    """Return the module of a flavour and its version. Raises MissingExtraError with the pip command."""
    command = f"pip install 'medusa-export[{name}]'"
    found, failure = None, ""
    for module in MODULES[name]:
        try:
            found = importlib.import_module(module)
            break
        except (ImportError, OSError, RuntimeError) as error:  # its libraries may be missing too
            failure = failure or str(error)
    if found is None:
        raise MissingExtraError(f"{name} is not installed ({failure}); it comes with: {command}")
    version = str(found.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSIONS[name]:
        least = ".".join(map(str, MIN_VERSIONS[name]))
        raise MissingExtraError(f"{name} {version} is too old, expected {least} or newer: pip install --upgrade {name}")
    return found, version
