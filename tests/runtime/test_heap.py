"""Freed memory goes back to the operating system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from medusa_runtime import Engine, loading
from medusa_runtime.heap import trim_heap

RESIDENT = """
import re
from pathlib import Path
from medusa_runtime.heap import trim_heap

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024  # MB

blocks = [bytes(100_000) + bytes([i % 251]) for i in range(1000)]  # 100 MB, below the size that is mapped by itself
blocks[:-1] = [None] * 999  # the last one, at the top of the heap, keeps the others from being returned
full = resident()
trim_heap()
assert resident() < full - 50, (full, resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_blocks_are_returned() -> None:
    subprocess.run([sys.executable, "-c", RESIDENT], check=True)


def test_an_engine_is_loaded_without_free_memory_left_behind(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed = []
    monkeypatch.setattr(loading, "trim_heap", lambda: (trimmed.append(True), trim_heap()))
    Engine.load(tiny_bundle)
    assert trimmed == [True]
