"""Starts and talks to the process that renders chat templates (`template_worker`); one such process per process.

It is started on first use with the current Python interpreter, or the one that `multiprocessing.set_executable` names
where Python is embedded in another program. It inherits no files, no standard input and only a few environment
variables, ends when this process ends, and is restarted when it has died.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import threading
from importlib.util import find_spec
from multiprocessing import spawn
from pathlib import Path
from typing import Any

from medusa_runtime import template_worker
from medusa_runtime.errors import PromptError, TemplateProcessError

SECONDS = 30  # wall-clock limit of one rendering, including process start; CPU time is limited separately
_KEPT = ("TZ", "TZDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")  # of the environment
_START = "import runpy, sys; sys.path += sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"


class TemplateProcess:
    """Renders templates in a child process, one request at a time; the process is started when needed."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant, so that a signal handler cannot deadlock
        self._busy = False
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, request: dict[str, Any]) -> str:
        """Send a request for `template_worker.answer` and return the text; raise PromptError with the reason otherwise.

        Any interruption of the exchange ends the process, so that no response is mistaken for that of another request.
        """
        try:
            data = template_worker.pack_message(request)
        except (TypeError, ValueError, RecursionError, MemoryError) as error:
            raise PromptError(
                f"it holds a value that JSON cannot represent: {error!r:.200}; pass texts, lists and dicts"
            ) from None
        if len(data) > template_worker.MAX_BYTES:
            raise PromptError(f"it has {len(data)} bytes, expected at most {template_worker.MAX_BYTES}; shorten it")
        with self._lock:
            if self._busy:
                raise PromptError(
                    "this thread was already rendering a template when a signal handler interrupted it; render outside "
                    "of the handler, or in another thread"
                )
            try:
                self._busy = True
                found = self._answer(data)
            finally:
                self._busy = False
        if "text" not in found:
            raise PromptError(found["error"])
        return found["text"]

    def _answer(self, data: bytes) -> dict[str, str]:
        try:
            process = self._running_process()
            timer = threading.Timer(SECONDS, process.kill)
            timer.daemon = True
            try:
                timer.start()
                return _exchange(process, data)
            except (OSError, EOFError, ValueError):
                code = process.poll() if _has_ended(process) else None
                raise _exit_error(code, is_late=timer.finished.is_set()) from None
            finally:
                timer.cancel()
        except BaseException:
            self._stop()
            raise

    def stop(self) -> None:
        """End the process; the next request starts a new one."""
        with self._lock:
            self._stop()

    def detach(self) -> None:
        """After a fork, leave the child process to the parent of this process."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process.returncode = 0  # it is not this process's child
            self._process = None
        self._lock, self._busy = threading.RLock(), False

    def _running_process(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._stop()
        if self._process is None:
            self._process = _start_process()
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _start_process() -> subprocess.Popen[bytes]:
    folders = {str(Path(spec.origin).parents[1]) for name in ("jinja2", "markupsafe") if (spec := _find_module(name))}
    executable = os.fsdecode(spawn.get_executable() or "")
    command = [executable, "-I", "-S", "-B", "-c", _START, template_worker.__file__, *sorted(folders)]
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    try:
        return subprocess.Popen(  # noqa: S603 -- this very interpreter
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
    except OSError as error:
        raise TemplateProcessError(
            f"the process that renders chat templates cannot be started: {error}; expected {executable!r} to be a "
            "Python interpreter: name one with multiprocessing.set_executable()"
        ) from None


def _find_module(name: str) -> Any:
    spec = find_spec(name)
    return spec if spec is not None and spec.origin else None


def _exchange(process: subprocess.Popen[bytes], request: bytes) -> dict[str, str]:
    if process.stdin is None or process.stdout is None:
        raise EOFError
    rest = memoryview(request)
    while rest:
        rest = rest[process.stdin.write(rest) :]
    found: dict[str, str] = template_worker.read_message(process.stdout)
    return found


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Wait up to a second for a process whose pipes are closed; return whether it ended."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1)
        return True
    return False


def _exit_error(code: int | None, *, is_late: bool) -> PromptError:
    """Return the error of a process that sent no response.

    Args:
        code: Its exit code; None if it is still running.
        is_late: Whether it was ended because its time was over.
    """
    if is_late:
        return PromptError(f"it takes more than {SECONDS} seconds")
    if code == -getattr(signal, "SIGXCPU", 0):
        return PromptError(f"it takes more than {template_worker.CPU_SECONDS} seconds of processor time")
    return TemplateProcessError(
        f"the process that renders it ended with code {code}, perhaps for want of memory; try again"
    )


TEMPLATE_PROCESS = TemplateProcess()
atexit.register(TEMPLATE_PROCESS.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=TEMPLATE_PROCESS.detach)
