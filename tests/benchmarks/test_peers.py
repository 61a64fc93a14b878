"""peers.py: the order of the measurements, and pieces of a run."""

import math
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import peers
import pytest
from peers_results import Results

from .factories import facts, report, results


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The systems that have been measured, in turn."""
    names: list[str] = []

    def measure(system: SimpleNamespace, *_: object) -> object:
        names.append(system.name)
        return report(1.0)

    monkeypatch.setattr(peers, "measure", measure)
    return names


def run(found: Results, file: Path, rounds: int, deadline: float = math.inf) -> int:
    systems = [(SimpleNamespace(name=name), facts(name), []) for name in ("a", "b", "c")]
    return peers.measure_all(Namespace(rounds=rounds, json=file, peer_python="python"), found, systems, {}, deadline)


def test_every_second_round_is_reversed(measured: list[str], tmp_path: Path) -> None:
    assert run(results(), tmp_path / "results.json", 3) == 0
    assert "".join(measured) == "abccbaabc"


def test_only_what_is_missing_is_measured(measured: list[str], tmp_path: Path) -> None:
    found = results((facts("a"), [report(2.0)]), (facts("b"), [report(2.0)]))
    run(found, tmp_path / "results.json", 2)
    assert "".join(measured) == "ccba"
    assert found.reports["a"][0] == report(2.0)
    assert Results.load(tmp_path / "results.json", found.conditions).reports == found.reports


def test_nothing_starts_after_the_deadline(measured: list[str], tmp_path: Path) -> None:
    assert run(results((facts("a"), [report(2.0)])), tmp_path / "results.json", 2, time.monotonic()) == 5
    assert measured == []


def test_the_machine_is_described() -> None:
    found = peers.machine()
    assert found["processor"]
    assert found["physical_cores"] >= 1
    assert set(found["features"]) <= set(peers.FEATURES)
