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
    """The systems that have been measured together, in turn."""
    names: list[str] = []

    def measure(systems: list[tuple[SimpleNamespace, list[Path]]], *_: object) -> list[object]:
        names.append("".join(system.name for system, _ in systems))
        return [report(1.0) for _ in systems]

    monkeypatch.setattr(peers, "measure_in_turns", measure)
    return names


def run(found: Results, file: Path, rounds: int, deadline: float = math.inf, *, apart: bool = False) -> int:
    systems = [(SimpleNamespace(name=name), facts(name), []) for name in ("a", "b", "c")]
    options = Namespace(rounds=rounds, json=file, peer_python="python", apart=apart)
    return peers.measure_all(options, found, systems, {}, deadline)


def test_every_second_round_is_reversed(measured: list[str], tmp_path: Path) -> None:
    assert run(results(), tmp_path / "results.json", 3) == 0
    assert measured == ["abc", "cba", "abc"]


def test_systems_can_be_in_memory_one_after_the_other(measured: list[str], tmp_path: Path) -> None:
    assert run(results(), tmp_path / "results.json", 2, apart=True) == 0
    assert measured == ["a", "b", "c", "c", "b", "a"]


def test_only_what_is_missing_is_measured(measured: list[str], tmp_path: Path) -> None:
    found = results((facts("a"), [report(2.0)]), (facts("b"), [report(2.0)]))
    run(found, tmp_path / "results.json", 2)
    assert measured == ["c", "cba"]
    assert found.reports["a"][0] == report(2.0)
    assert len({one[0].get("together") for one in found.reports.values()}) == 2  # a and b before, c alone
    assert len({one[1]["together"] for one in found.reports.values()}) == 1
    assert Results.load(tmp_path / "results.json", found.conditions).reports == found.reports


def test_nothing_starts_after_the_deadline(measured: list[str], tmp_path: Path) -> None:
    assert run(results((facts("a"), [report(2.0)])), tmp_path / "results.json", 2, time.monotonic()) == 5
    assert measured == []


def test_the_machine_is_described() -> None:
    found = peers.machine()
    assert found["processor"]
    assert found["physical_cores"] >= 1
    assert set(found["features"]) <= set(peers.FEATURES)
