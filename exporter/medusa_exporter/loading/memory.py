"""Checks that memory suffices before a model is loaded, from the machine's free memory and cgroup limits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from medusa_runtime.errors import CapacityError

ROOT = Path("/")
MB = 10**6


def check_memory(needed: int, what: str, root: Path = ROOT) -> None:
    """Raise CapacityError unless `needed` bytes of memory are available; do nothing where that is unknown.

    Args:
        needed: Bytes.
        what: What needs them, for the message.
        root: Folder with proc and sys.
    """
    left = available_memory(root)
    if left is not None and needed > left:
        raise CapacityError(
            f"{what} needs about {needed // MB:,} MB of memory, but {left // MB:,} MB are left (free memory and swap, "
            "within the limits of the process's control groups); expected enough: close other programs, raise the "
            "limit, or use a machine with more memory or a smaller model"
        )


def available_memory(root: Path = ROOT) -> int | None:
    """Return the bytes that this process can still allocate, including swap; None on systems without /proc/meminfo.

    Cached files do not count as used memory of a control group, because the kernel drops them when memory is needed.
    """
    sizes = _machine(root)
    if "MemAvailable" not in sizes:
        return None
    swap = sizes.get("SwapFree", 0)
    groups = [left for left in _groups(root, swap) if left is not None]
    return min([sizes["MemAvailable"] + swap, *groups])


def _machine(root: Path) -> dict[str, int]:
    """Return the entries of /proc/meminfo in bytes; empty if it does not exist."""
    try:
        text = (root / "proc/meminfo").read_text(encoding="ascii")
    except (OSError, ValueError):
        return {}
    return {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _groups(root: Path, swap: int) -> Iterator[int | None]:
    """Yield the bytes available in each control group of the process, its own and all above it, of both versions."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "-", "")
        if not controllers:
            tree, left = root / "sys/fs/cgroup", _left_v2
        elif "memory" in controllers.split(","):
            tree, left = root / "sys/fs/cgroup/memory", _left_v1
        else:
            continue
        own = tree / path.lstrip("/")
        # in a container the path may be the host's; the container's group is then the top of the tree
        for folder in (own, *own.parents):
            if folder.is_relative_to(tree):
                yield left(folder, swap)


def _left_v2(folder: Path, swap: int) -> int | None:
    limits = [
        _number(folder / name) for name in ("memory.max", "memory.high")
    ]  # above memory.high the process is throttled
    limit, used = (
        min((limit for limit in limits if limit is not None), default=None),
        _number(folder / "memory.current"),
    )
    if limit is None or used is None:
        return None
    most, swapped = _number(folder / "memory.swap.max"), _number(folder / "memory.swap.current")
    if most is not None and swapped is not None:
        swap = min(swap, max(most - swapped, 0))
    return max(limit - used + _cached(folder, "inactive_file", "active_file") + swap, 0)


def _left_v1(folder: Path, swap: int) -> int | None:
    limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
    if limit is None or used is None:
        return None
    cached = _cached(folder, "total_inactive_file", "total_active_file")
    left = limit - used + cached + swap
    most, both = _number(folder / "memory.memsw.limit_in_bytes"), _number(folder / "memory.memsw.usage_in_bytes")
    if most is not None and both is not None:  # these count memory and swap together
        left = min(left, most - both + cached)
    return max(left, 0)


def _cached(folder: Path, *names: str) -> int:
    try:
        text = (folder / "memory.stat").read_text(encoding="ascii")
    except (OSError, ValueError):
        return 0
    sizes = dict(re.findall(r"^(\w+) (\d+)$", text, re.MULTILINE))
    return sum(int(sizes.get(name, 0)) for name in names)


def _number(file: Path) -> int | None:
    """Return the number in a file; None for `max` and for a missing file."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
