"""Measures one system in one process: reads requests from standard input, and writes a line of JSON for each of them.

The first request is a job. Next to what peers_runners.py needs it has `prompts` and `prefills`, which are lists of
token ids, the numbers `max_new_tokens`, `warm_up_tokens` and `attempts`, and `spawned`: the monotonic clock before the
process was created. Then {"prompts": i} answers a prompt, {"prefills": i} decodes only the first token after one, and
{} ends the process. This project is imported only to measure its own decoder, so that a peer can run in another Python
environment.
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
from collections.abc import Iterator
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


def serve(requests: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Open the system of a job, the first request, and yield a report for it and for each request after it."""
    job: Job = next(requests)
    open_system, packages = RUNNERS[job["system"]]
    answer = open_system(job)
    first: list[float] = []  # when the first token of the process was known
    answer(job["prompts"][0], job["warm_up_tokens"], lambda _: first.append(time.monotonic()) if not first else None)
    resident = memory()
    yield {
        "versions": {name: importlib.metadata.version(name) for name in packages} | {"python": sys.version.split()[0]},
        "start_seconds": first[0] - job["spawned"],
        "memory_bytes": resident,
    }
    for request in requests:
        if "prompts" in request:
            prompt = job["prompts"][request["prompts"]]
            yield least_disturbed(answer, prompt, job["max_new_tokens"], job["attempts"])
        elif "prefills" in request:
            found = measure(answer, job["prefills"][request["prefills"]], 1)
            yield {name: found[name] for name in ("prompt_tokens", "prefill_seconds")}
        else:
            break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    yield {"peak_memory_bytes": max(peak, resident.get("rss", 0))}  # the system updates the peak a little later


def main() -> None:
    """Serve requests; what libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)
        for report in serve(map(json.loads, sys.stdin)):
            print(json.dumps(report), file=output, flush=True)


if __name__ == "__main__":
    main()
