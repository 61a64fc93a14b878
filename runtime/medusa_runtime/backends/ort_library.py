"""The only import of ONNX Runtime in the project, so that a version that would crash is refused everywhere."""

from __future__ import annotations

from typing import Any

from medusa_runtime.errors import MissingExtraError

MIN_VERSION = (1, 31)  # before it, TopK over no rows (a step without a draft) ends the process with SIGFPE


def import_onnxruntime(extra: str) -> Any:
    """Import ONNX Runtime.

    Args:
        extra: The extra of `medusa-export` that installs it ("cpu", "gpu" or "export"), for the error message.

    Returns:
        The module `onnxruntime`.

    Raises:
        MissingExtraError: It is not installed or too old.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            f"onnxruntime is not installed ({error}); install it: pip install 'medusa-export[{extra}]'"
        ) from error
    if tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < MIN_VERSION:
        raise MissingExtraError(
            f"onnxruntime {onnxruntime.__version__} is too old, it crashes on steps without a draft; expected "
            f"{'.'.join(map(str, MIN_VERSION))} or newer: pip install --upgrade 'medusa-export[{extra}]'"
        )
    return onnxruntime
