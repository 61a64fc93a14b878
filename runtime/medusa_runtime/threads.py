"""How many threads decoding should use: one per physical core that this process may run on."""

from __future__ import annotations

import os
from pathlib import Path


def physical_cores() -> int:
    """Physical cores among the processors that this process may use, at least 1.

    Hyper-threads of one core share its arithmetic units, so more threads than cores only wait for each other. Read
    from Linux's /sys; elsewhere every processor counts.
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
