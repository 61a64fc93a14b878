"""A child process that tries one case after another; run as a program: `python child.py MODULE STATE`.

The parent writes one JSON line a case and reads one JSON line for it. A crash, a hang or growth of the child is seen
by the parent and charged to the case that it was at.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HANG = 60.0  # seconds
LIMIT = 12 << 30  # bytes of address space; a case that asks for more gets MemoryError


class Child:
    """The parent's end: one child process for `module`, started again whenever it has ended."""

    def __init__(self, module: str, state: Path, scratch: Path) -> None:
        """module: name of a module of this folder that has `prepare(state)` and `run(context, case)`."""
        self._module, self._state, self._scratch = module, state, scratch
        self._process: subprocess.Popen[bytes] | None = None
        self.started = 0

    def ask(self, case: dict[str, Any]) -> dict[str, Any]:
        """Run one case; what came of it has "outcome": the child's word, or "crash" or "hang"."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(case).encode() + b"\n")
        process.stdin.flush()
        until, line = time.monotonic() + HANG, b""
        while not line.endswith(b"\n"):
            if not select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
                self.close()
                return {"outcome": "hang", "detail": f"no answer in {HANG:.0f} s"}
            if not (piece := os.read(process.stdout.fileno(), 1 << 16)):
                code = process.wait()
                self._process = None
                return {"outcome": "crash", "detail": f"exit code {code}"}
            line += piece
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self.started += 1
            self._process = subprocess.Popen(
                [sys.executable, __file__, self._module, str(self._state)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"TMPDIR": str(self._scratch), "OMP_NUM_THREADS": "1"},
            )
        return self._process


def resident_megabytes() -> float:
    """Memory of this process that no file stands for, in MB (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1e3
    return 0.0


def main() -> None:
    """Answer cases until standard input ends; a library that prints does not disturb the answers."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module = importlib.import_module(sys.argv[1])
    context = module.prepare(Path(sys.argv[2]))
    for line in sys.stdin.buffer:
        answer: dict[str, Any] = {}
        try:
            answer = module.run(context, json.loads(line))
        except BaseException as error:  # whatever is not a typed error is a finding
            answer = {"outcome": "untyped", "detail": f"{type(error).__module__}.{type(error).__name__}: {error}"[:500]}
            answer["where"] = _where(error)
        answer["megabytes"] = resident_megabytes()
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _where(error: BaseException) -> str:
    trace, found = error.__traceback__, ""
    while trace is not None:
        with contextlib.suppress(ValueError):
            found += f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno} "
        trace = trace.tb_next
    return found[-200:]


if __name__ == "__main__":
    main()
