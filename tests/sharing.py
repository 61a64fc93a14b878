"""Makes what several test processes need once: the first that asks makes it, the others wait and find it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared_root(factory: pytest.TempPathFactory) -> Path:
    """The folder that all processes of one test run share: pytest-xdist gives each worker a subfolder of its own."""
    base = factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    root.mkdir(exist_ok=True)
    return root


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return `shared_root/name`, a file or folder that `make` writes at that path where no process has yet."""
    path = shared_root(factory) / name
    done = path.with_name(f"{name}.done")
    with FileLock(path.with_name(f"{name}.lock")):
        if not done.exists():
            make(path)
            done.touch()
    return path
