"""Imports the installed TensorRT or TensorRT-RTX library, whose packages have several module names."""

from __future__ import annotations

import importlib
from typing import Any

from medusa_runtime.errors import MissingExtraError
from medusa_runtime.package_versions import check_version

MODULES = {  # flavour -> module names of the full package and of the bindings alone
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
MIN_VERSIONS = {"tensorrt": (8, 6), "tensorrt-rtx": (1, 0)}


def import_tensorrt(name: str) -> tuple[Any, str]:
    """Return the module and version of a TensorRT flavour.

    Args:
        name: "tensorrt" or "tensorrt-rtx".

    Raises:
        MissingExtraError: It is not installed or too old; the message has the pip command.
    """
    command = f"pip install 'medusa-export[{name}]'"
    found, failure = None, ""
    for module in MODULES[name]:
        try:
            found = importlib.import_module(module)
            break
        except (ImportError, OSError, RuntimeError) as error:  # RuntimeError, OSError: shared libraries are missing
            failure = failure or str(error)
    if found is None:
        raise MissingExtraError(f"{name} is not installed ({failure}); install it: {command}")
    version = str(found.__version__)
    check_version(name, version, MIN_VERSIONS[name], f"pip install --upgrade {name}")
    return found, version
