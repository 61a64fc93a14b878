"""The counts of a fuzz run are printed at its end."""

from __future__ import annotations

import pytest

from .tally import Tally

TALLIES: list[Tally] = []


@pytest.fixture(scope="session")
def tallies() -> list[Tally]:
    """Where each test puts its counts."""
    return TALLIES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what came of the cases, findings first, the shortest of them in full."""
    for tally in TALLIES:
        terminalreporter.section(f"fuzz: {tally.name}")
        for line in tally.lines():
            terminalreporter.line(line)
