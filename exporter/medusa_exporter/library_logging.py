"""Silences the log messages and warnings of libraries that do not concern the user."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

from medusa_runtime.log import LOGGER

from medusa_exporter.console import Verbosity, verbosity

END_OF_REQUEST = "request %d ended with "  # the start of a warning of the runtime


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


@contextlib.contextmanager
def ends_are_not_logged() -> Iterator[None]:
    """Leave out the runtime's warnings of requests that ended with an error, where the error itself is reported."""

    def is_other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(END_OF_REQUEST)

    LOGGER.addFilter(is_other)
    try:
        yield
    finally:
        LOGGER.removeFilter(is_other)
