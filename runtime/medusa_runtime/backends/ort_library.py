"""ONNX Runtime itself: imported here and nowhere else, so that a version that would crash is refused everywhere."""

from __future__ import annotations

from typing import Any

from medusa_runtime.errors import MissingExtraError

LEAST_VERSION = (1, 31)  # before it, TopK over no rows (a step without a draft) ends the process by SIGFPE


def import_onnxruntime(extra: str) -> Any:
    """Import ONNX Runtime. extra: what it comes with. Raises MissingExtraError where it is missing or too old."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            f"onnxruntime is not installed ({error}); it comes with: pip install 'medusa-export[{extra}]'"
        ) from error
    if tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < LEAST_VERSION:
        raise MissingExtraError(
            f"onnxruntime {onnxruntime.__version__} is too old, it crashes on steps without a draft; expected "
            f"{'.'.join(map(str, LEAST_VERSION))} or newer: pip install --upgrade 'medusa-export[{extra}]'"
        )
    return onnxruntime
