"""Measures one system in one process: reads a job from standard input and writes a report to standard output.

Next to what peers_runners.py needs, a job has `prompts` and `prefills`, which are lists of token ids (every prompt is
answered; after a prefill only the first token is decoded), the numbers `max_new_tokens`, `warm_up_tokens` and
`attempts`, and `spawned`: the monotonic clock before the process was created. This project is imported only to measure
its own decoder, so that a peer can run in another Python environment.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from peers_runners import RUNNERS, Answer, Job

QUIET = 0.03  # share of the processors that other processes may use during an undisturbed answer


def measure(answer: Answer, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Decode one answer; the prefill and the first token, which it produces, are timed separately."""
    found: list[int] = []
    times: list[float] = []
    busy: list[float] = []

    def report(added: list[int]) -> None:
        times.append(time.perf_counter())
        busy.append(time.process_time())
        found.extend(added)

    others = _OtherLoad()
    started = time.perf_counter()
    answer(prompt, tokens, report)
    if len(found) != tokens:
        raise RuntimeError(f"the answer has {len(found)} tokens in {len(times) - 1} steps, expected {tokens} tokens")
    seconds = [after - before for before, after in itertools.pairwise(times)]
    decoding = times[-1] - times[0]
    return {
        "prompt_tokens": len(prompt),
        "prefill_seconds": times[0] - started,
        "decode_seconds": decoding,
        "median_step_seconds": statistics.median(seconds) if seconds else 0.0,
        "cores_used": (busy[-1] - busy[0]) / decoding if seconds else 0.0,
        "other_load": others.share(),
        "steps": len(seconds),
        "tokens": tokens - 1,  # added by steps
        "answer": found,
    }


def least_disturbed(answer: Answer, prompt: list[int], tokens: int, attempts: int) -> dict[str, Any]:
    """Decode an answer until no other process disturbs it, at most `attempts` times; return the least disturbed one."""
    measured: list[dict[str, Any]] = []
    while len(measured) < attempts and not (measured and measured[-1]["other_load"] < QUIET):
        measured.append(measure(answer, prompt, tokens))
    return min(measured, key=lambda one: float(one["other_load"]))


class _OtherLoad:
    """Measures the share of the processors that other processes use, from /proc/stat on Linux; 0 elsewhere."""

    def __init__(self) -> None:
        self._before = self._now()

    def share(self) -> float:
        """Return the share since this object was created."""
        (wall, busy, own), (wall_before, busy_before, own_before) = self._now(), self._before
        others = (busy - busy_before) - (own - own_before)
        return max(0.0, others / (wall - wall_before) / (os.cpu_count() or 1))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        try:
            ticks = [int(word) for word in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
            busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and iowait
        except OSError:
            busy = time.process_time()
        return time.perf_counter(), busy, time.process_time()


def memory() -> dict[str, int]:
    """Return the process's memory in bytes: resident, proportional (shared pages divided), anonymous; {} elsewhere."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    except OSError:  # not Linux
        return {}
    sizes = {name: int(size.split()[0]) * 1024 for name, _, size in (line.partition(":") for line in lines)}
    return {"rss": sizes["Rss"], "pss": sizes["Pss"], "anonymous": sizes["Anonymous"]}


def run(job: Job) -> dict[str, Any]:
    """Open the system of a job, decode, and return the report."""
    open_system, packages = RUNNERS[job["system"]]
    answer = open_system(job)
    first: list[float] = []  # when the first token of the process was known
    answer(job["prompts"][0], job["warm_up_tokens"], lambda _: first.append(time.monotonic()) if not first else None)
    resident = memory()
    tokens, attempts = job["max_new_tokens"], job["attempts"]
    prompts = [least_disturbed(answer, prompt, tokens, attempts) for prompt in job["prompts"]]
    prefills = [measure(answer, prompt, 1) for prompt in job["prefills"]]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages} | {"python": sys.version.split()[0]},
        "start_seconds": first[0] - job["spawned"],
        "memory_bytes": resident,
        "peak_memory_bytes": max(peak, resident.get("rss", 0)),  # the system updates the peak a little later
        "prompts": prompts,
        "prefills": [{name: one[name] for name in ("prompt_tokens", "prefill_seconds")} for one in prefills],
    }


if __name__ == "__main__":
    json.dump(run(json.load(sys.stdin)), sys.stdout)
