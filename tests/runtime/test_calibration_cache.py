"""Calibrations are found by bundle, graph, device and threads, and only used with the versions that they measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from medusa_runtime.calibration import to_document
from medusa_runtime.calibration_cache import cache_folder, calibration_file, find_graph, machine_of, read_cached
from medusa_runtime.errors import CalibrationError

from ..calibrations import DIGEST, MACHINE, calibration
from .fake_backend import FakeBackend

GRAPH = "ort-cpu-fp32"


def store(found, file=None):
    file = file or calibration_file(found.bundle, found.graph, found.machine)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(to_document([found])))
    return file


@pytest.mark.parametrize(
    ("environment", "platform", "expected"),
    [
        ({"MEDUSA_CACHE": "here", "XDG_CACHE_HOME": "/x"}, "linux", "here"),
        ({"XDG_CACHE_HOME": "/x"}, "linux", "/x/medusa-export"),
        ({"XDG_CACHE_HOME": "relative"}, "linux", "HOME/.cache/medusa-export"),
        ({}, "linux", "HOME/.cache/medusa-export"),
        ({"XDG_CACHE_HOME": "/x"}, "darwin", "HOME/Library/Caches/medusa-export"),
        ({"LOCALAPPDATA": "/local"}, "win32", "/local/medusa-export"),
        ({}, "win32", "HOME/AppData/Local/medusa-export"),
    ],
)
def test_the_folder_is_the_systems(environment, platform, expected):
    assert cache_folder(environment, platform) == Path(expected.replace("HOME", str(Path.home())))


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("MEDUSA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() is None
    assert calibration_file(DIGEST, GRAPH, MACHINE) is None
    assert read_cached(DIGEST, GRAPH, FakeBackend()) is None


def test_the_machine_is_the_backends():
    assert machine_of(FakeBackend()) == replace(
        MACHINE, threads=0, medusa_export=machine_of(FakeBackend()).medusa_export
    )


def test_what_was_stored_is_found_again():
    machine = machine_of(FakeBackend())
    assert read_cached(DIGEST, GRAPH, FakeBackend()) is None
    store(calibration(machine=machine))
    assert read_cached(DIGEST, GRAPH, FakeBackend()).machine == machine
    assert read_cached("b" * 64, GRAPH, FakeBackend()) is None
    assert read_cached(DIGEST, "ort-cpu-int8", FakeBackend()) is None


def test_another_device_or_number_of_threads_has_another_file():
    files = [calibration_file(DIGEST, GRAPH, one) for one in (MACHINE, replace(MACHINE, threads=1))]
    files.append(calibration_file(DIGEST, GRAPH, replace(MACHINE, device="stone")))
    assert len(set(files)) == 3


@pytest.mark.parametrize("change", [{"library": "fake 2.0"}, {"medusa_export": "9"}, {"driver": "1"}])
def test_another_version_is_outdated(change):
    machine = machine_of(FakeBackend())
    store(calibration(machine=replace(machine, **change)))
    [name] = change  # the message names what differs, and nothing else
    with pytest.raises(
        CalibrationError, match=rf"was measured with {name} [^,]*, expected {name} [^,]*; measure again"
    ):
        read_cached(DIGEST, GRAPH, FakeBackend())


def test_another_bundles_calibration_is_refused(tmp_path):
    file = store(calibration(), tmp_path / "c.json")
    assert find_graph(file, DIGEST, GRAPH).machine == MACHINE  # of whatever machine
    with pytest.raises(CalibrationError, match=f"digest {DIGEST}, expected {'b' * 64}; measure again"):
        find_graph(file, "b" * 64, GRAPH)
    with pytest.raises(CalibrationError, match="has ort-cpu-fp32, expected ort-cpu-int8; measure again"):
        find_graph(file, DIGEST, "ort-cpu-int8")
