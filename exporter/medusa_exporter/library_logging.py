"""Silences the log messages and warnings of libraries that do not concern the user."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

from medusa_exporter.console import Verbosity, verbosity


@contextlib.contextmanager
def log_errors_only(name: str) -> Iterator[None]:
    """Let the logger `name` log errors only, and suppress Python warnings, while the block runs; not with --verbose."""
    if verbosity() == Verbosity.VERBOSE:
        yield
        return
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
