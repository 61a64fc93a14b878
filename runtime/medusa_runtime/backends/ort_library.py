"""The only import of ONNX Runtime in the project, so that a version that would crash is refused everywhere."""

from __future__ import annotations

from typing import Any

from medusa_runtime.errors import MissingExtraError
from medusa_runtime.package_versions import check_version

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
    command, reason = f"pip install --upgrade 'medusa-export[{extra}]'", "it crashes on steps without a draft; "
    check_version("onnxruntime", onnxruntime.__version__, MIN_VERSION, command, reason)
    return onnxruntime
