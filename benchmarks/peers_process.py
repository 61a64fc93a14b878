"""Workers of peers.py: each system in a process of its own, and all of them in turns, prompt by prompt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peers_contenders import Contender
    from peers_results import Report

WORKER = Path(__file__).resolve().with_name("peers_worker.py")
REST = 0.3  # seconds between two turns, in which threads of the last system that wait for more work give up


class Worker:
    """One system, opened in a new process whose files are in the page cache.

    Attributes:
        name: The system's name.
    """

    def __init__(self, system: Contender, peer_python: str, common: dict[str, Any], files: Sequence[Path]) -> None:
        """Start the process."""
        for file in files:
            with file.open("rb") as content:
                while content.read(1 << 22):
                    pass
        self.name, self._job = system.name, {**common, **system.job, "spawned": time.monotonic()}
        environment = {name: str(value) for name, value in system.job.get("environment", {}).items()}
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by __exit__
        self._process = subprocess.Popen(
            [sys.executable if system.own else peer_python, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            env=os.environ | environment,
        )

    def open(self) -> dict[str, Any]:
        """Wait until the process is ready, and return what it reports."""
        return self._ask(self._job)

    def measure(self, kind: str, number: int) -> dict[str, Any]:
        """Measure one of the job's lists: kind "prompts" or "prefills"."""
        time.sleep(REST)
        return self._ask({kind: number})

    def finish(self) -> dict[str, Any]:
        """Let the process end, and return its last report."""
        last = self._ask({})
        self._process.communicate()
        return last

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.communicate()
        self._messages.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        answer = exchange(self._process, request)
        if not answer:
            code = self._process.wait()
            self._messages.seek(0)
            messages = self._messages.read().decode(errors="replace")
            raise SystemExit(f"the worker of {self.name} ended with exit code {code}:\n{messages[-3000:]}")
        found: dict[str, Any] = json.loads(answer)
        return found


def exchange(process: subprocess.Popen[str], request: Any) -> str:
    """Write a request to a process as a line of JSON and return the line that it answers; "" if it has ended."""
    assert process.stdin is not None and process.stdout is not None  # noqa: S101 -- opened as pipes
    with suppress(BrokenPipeError):  # of a process that has ended, which is found out below
        print(json.dumps(request), file=process.stdin, flush=True)
    return process.stdout.readline()


def measure_in_turns(
    systems: Sequence[tuple[Contender, Sequence[Path]]], peer_python: str, common: dict[str, Any]
) -> list[Report]:
    """Open all systems, then let them answer each prompt in turns, every second one in reverse order.

    So the speed of the machine, which drifts within minutes, is the same for all systems on the same prompt.

    Args:
        systems: The contenders, each with the files of its model.
        peer_python: The Python interpreter of the peers.
        common: What the jobs of all workers have in common.
    """
    with ExitStack() as stack:
        workers: list[Worker] = []
        reports: list[Report] = []
        for system, files in systems:
            workers.append(stack.enter_context(Worker(system, peer_python, common, files)))
            reports.append(workers[-1].open())
        turns = list(zip(workers, reports, strict=True))
        for kind in ("prompts", "prefills"):
            for report in reports:
                report[kind] = []
            for number in range(len(common[kind])):
                for worker, report in turns if number % 2 == 0 else turns[::-1]:
                    report[kind].append(worker.measure(kind, number))
        for worker, report in turns:
            report.update(worker.finish())
    return reports
