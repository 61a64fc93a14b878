"""Optional dependencies: an error that names the `pip install` command where one is not installed."""

from __future__ import annotations

import importlib
from typing import Any

from medusa_runtime.errors import MissingExtraError

EXTRAS = {  # importable module: the extra of medusa-export that installs it
    **dict.fromkeys(
        (
            "accelerate",
            "filelock",
            "gguf",
            "huggingface_hub",
            "matplotlib",
            "onnx",
            "onnx_ir",
            "onnxscript",
            "polygraphy",
            "safetensors",
            "torch",
            "tqdm",
            "transformers",
        ),
        "export",
    ),
    "onnxruntime": "cpu",
    "cuda": "gpu",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
}


def import_extra(module: str, extra: str) -> Any:
    """Import an optional dependency.

    Args:
        module: Name of the module.
        extra: Name of the extra of medusa-export that installs it, e.g. "export".

    Raises:
        MissingExtraError: The module cannot be imported; the message has the pip command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(module, extra, error) from error


def missing_extra(error: BaseException) -> MissingExtraError | None:
    """Return the error to show if `error` comes from a failed import of an optional dependency, else None.

    Libraries may raise their own errors when an import fails; the failed import is then the cause of these.
    """
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, MissingExtraError):
        if isinstance(seen, ImportError) and _package(seen) in EXTRAS:
            return _missing(_package(seen), EXTRAS[_package(seen)], seen)
        seen = seen.__cause__ or seen.__context__
    return None


def _missing(module: str, extra: str, error: ImportError) -> MissingExtraError:
    package = _package(error)  # the module may be there, but lack one that it needs
    reason = " ".join(str(error).split())
    return MissingExtraError(
        f"{package if package in EXTRAS else module} is not installed ({reason}); install it: "
        f"pip install 'medusa-export[{extra}]'"
    )


def _package(error: ImportError) -> str:
    return (error.name or "").partition(".")[0]
