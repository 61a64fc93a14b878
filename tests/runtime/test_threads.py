import os
from pathlib import Path

import pytest
from medusa_runtime import threads


@pytest.fixture
def machine(monkeypatch):
    """Make a machine of processors, given as processor -> its siblings, or None where /sys does not say."""

    def make(siblings):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(siblings), raising=False)

        def read_text(path):
            text = siblings[int(path.parts[-3].removeprefix("cpu"))]
            if text is None:
                raise FileNotFoundError(path)
            return text

        monkeypatch.setattr(Path, "read_text", read_text)

    return make


@pytest.mark.parametrize(
    ("siblings", "cores"),
    [
        ({0: "0\n", 1: "1\n"}, 2),
        ({0: "0,2\n", 1: "1,3\n", 2: "0,2\n", 3: "1,3\n"}, 2),
        ({2: "0,2\n", 3: "1,3\n", 7: "7\n"}, 3),  # only some processors are ours
        ({0: "0-1\n"}, 1),
        ({0: None, 1: None, 5: None}, 3),
        ({}, 1),
    ],
)
def test_hyper_threads_of_one_core_count_once(machine, siblings, cores):
    machine(siblings)
    assert threads.physical_cores() == cores


@pytest.mark.parametrize(("count", "cores"), [(6, 6), (None, 1)])
def test_without_affinity_every_processor_counts(monkeypatch, count, cores):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert threads.physical_cores() == cores


def test_this_machine_has_cores():
    assert 1 <= threads.physical_cores() <= os.cpu_count()
