"""Where calibrations are kept: in the user's cache, one file for each bundle, graph, device and number of threads."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from medusa_runtime.calibration import REMEDY, GraphCalibration, Machine, read_calibrations
from medusa_runtime.errors import CalibrationError

if TYPE_CHECKING:
    from medusa_runtime.backends.base import Backend


def cache_folder(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path | None:
    """Return medusa-export's folder in the user's cache, which need not exist.

    It is `MEDUSA_CACHE` if that is set, otherwise `medusa-export` in the system's cache folder: `XDG_CACHE_HOME` or
    `~/.cache`, `~/Library/Caches` on macOS, `LOCALAPPDATA` on Windows.

    Returns:
        None for a user without a home folder.
    """
    if chosen := environment.get("MEDUSA_CACHE"):
        return Path(chosen)
    try:
        if platform == "win32":
            base = Path(environment.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            named = environment.get("XDG_CACHE_HOME", "")
            base = Path(named) if named.startswith("/") else Path.home() / ".cache"  # relative paths are to be ignored
    except RuntimeError:  # no home
        return None
    return base / "medusa-export"


def calibrations_of(digest: str) -> Path | None:
    """Return the folder with a bundle's calibrations, by its digest; None for a user without a home folder."""
    folder = cache_folder()
    return None if folder is None else folder / "calibrations" / digest


def calibration_file(digest: str, graph: str, machine: Machine) -> Path | None:
    """Return the file that holds the calibration of one graph on one machine; None for a user without a home folder.

    Versions are not part of its name: another version's calibration is replaced, and found to be outdated when read.
    """
    folder = calibrations_of(digest)
    place = hashlib.sha256(f"{machine.device}\n{machine.threads}".encode()).hexdigest()[:16]
    return None if folder is None else folder / f"{graph}-{place}.json"


def machine_of(backend: Backend) -> Machine:
    """Return what the step times of a loaded backend depend on; on a GPU it may take a second."""
    facts = backend.facts()
    try:
        own = version("medusa-export")
    except PackageNotFoundError:  # run from a checkout that is not installed
        own = "unknown"
    return Machine(facts.device, facts.threads, facts.driver or "none", f"{facts.library} {facts.version}", own)


def read_cached(digest: str, graph: str, backend: Backend) -> GraphCalibration | None:
    """Return the calibration of a graph on this machine, None if there is none in the cache.

    Raises:
        CalibrationError: The file is damaged, belongs to something else, or was measured with other versions.
    """
    folder = calibrations_of(digest)
    if folder is None or not folder.is_dir():
        return None
    machine = machine_of(backend)
    file = calibration_file(digest, graph, machine)
    if file is None or not file.exists():
        return None
    found = find_graph(file, digest, graph)
    if found.machine != machine:
        names = [one.name for one in fields(Machine) if getattr(found.machine, one.name) != getattr(machine, one.name)]
        was, now = (", ".join(f"{name} {getattr(one, name)}" for name in names) for one in (found.machine, machine))
        raise CalibrationError(f"the calibration {file} was measured with {was}, expected {now}; {REMEDY}")
    return found


def find_graph(file: Path, digest: str, graph: str) -> GraphCalibration:
    """Return a graph's calibration in a file. Raises CalibrationError if it has none, or only of another bundle."""
    found = read_calibrations(file)
    of_graph = [one for one in found if one.graph == graph]
    if not of_graph:
        raise CalibrationError(
            f"the calibration {file} has {', '.join(one.graph for one in found)}, expected {graph}; {REMEDY}"
        )
    for one in of_graph:
        if one.bundle == digest:
            return one
    raise CalibrationError(
        f"the calibration {file} is of the bundle with the digest {of_graph[0].bundle}, expected {digest}; {REMEDY}"
    )
