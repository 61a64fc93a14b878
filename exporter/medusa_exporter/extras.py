"""Optional dependencies: imported where they are needed, with an error that says how to install them."""

from __future__ import annotations

import importlib
from typing import Any

from medusa_runtime.errors import MissingExtraError


def import_extra(module: str, extra: str) -> Any:
    """Import an optional dependency, or raise MissingExtraError with the pip command that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} is not installed ({error}); it comes with: pip install 'medusa-export[{extra}]'"
        ) from error
