"""A library is silent inside, and as loud as before behind it."""

from __future__ import annotations

import logging
import warnings

import pytest
from medusa_exporter.library_logging import log_errors_only


def test_quiet(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("a.library")
    logger.setLevel(logging.INFO)
    with log_errors_only("a.library"):
        logger.warning("hidden")
        logger.error("shown")
        warnings.warn("hidden", stacklevel=1)
    logger.info("shown too")
    assert [record.message for record in caplog.records] == ["shown", "shown too"]
    with pytest.warns(UserWarning, match="seen"):
        warnings.warn("seen", stacklevel=1)
    with pytest.raises(ValueError, match="inside"), log_errors_only("a.library"):
        raise ValueError("inside")
    assert logger.level == logging.INFO
