"""Determines the number of CPU threads to decode with: one per physical core, within the process's CPU quota."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def default_threads() -> int:
    """Return one thread per physical core, but at most the CPU quota of the container.

    A thread beyond the quota would be suspended in the middle of a step, and the other threads would wait for it.
    """
    quota = cpu_quota()
    return physical_cores() if quota is None else max(1, min(physical_cores(), int(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the smallest CPU quota of the process's control groups, in CPUs; None without a limit.

    Read from Linux's cgroups, version 2 (`cpu.max`) or 1 (`cpu.cfs_quota_us`), under the folder `root`.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not on this system
        return None
    quotas = []
    for line in lines:
        _number, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        group = mount / path.strip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(mount))):
            if quota := _quota_of(folder):
                quotas.append(quota)
    return min(quotas, default=None)


def _quota_of(folder: Path) -> float | None:
    """Return the quota of one control group in CPUs; None if it has none."""
    try:
        if (file := folder / "cpu.max").is_file():
            quota, period = file.read_text(encoding="ascii").split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period")
            )
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except (OSError, ValueError):  # "max", or a group without the controller
        return None


def physical_cores() -> int:
    """Return the number of physical cores that this process may use, at least 1.

    Hyper-threads of a core share its arithmetic units, so more threads than cores only wait for each other. Read from
    Linux's /sys; on other systems every logical CPU counts.
    """
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # not on this system
        return max(1, os.cpu_count() or 1)
    cores = set()
    for processor in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(processor))
    return max(1, len(cores))


def processor_name() -> str:
    """Return the CPU's model name from Linux's /proc; on other systems from Python's `platform`."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not on this system
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
