"""Runs each backend in a separate process, so that two libraries never share one and a crash stops only one backend."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_runtime.accept import ACCEPT_RULES
from medusa_runtime.backends import load_backend
from medusa_runtime.backends.base import BackendFacts
from medusa_runtime.bundle import Bundle
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import MedusaError

from medusa_exporter.bench.forced_acceptance import RecordedAcceptance
from medusa_exporter.bench.timing import Measurement, Question, TimedDecoder


class WorkerSettings(NamedTuple):
    """How a backend is loaded in a worker process.

    Attributes:
        bundle: The bundle.
        trees: The trees to measure.
        precision: Precision of the graph; None for the bundle's default.
        threads: Number of CPU threads; None for the default.
        max_length: Maximum number of tokens of a sequence; None for the model's context.
        forced: How many tokens each step accepts; None to let the model decide.
        gpu: Index of the GPU that GPU backends use.
    """

    bundle: Bundle
    trees: Sequence[TreeProfile]
    precision: str | None = None
    threads: int | None = None
    max_length: int | None = None
    forced: RecordedAcceptance | None = None
    gpu: int = 0


class LoadedBackend(NamedTuple):
    """A backend that has been loaded.

    Attributes:
        facts: Its device and library.
        precision: Precision of its graph.
        context: Number of tokens that it has room for, at most the model's context.
    """

    facts: BackendFacts
    precision: str
    context: int


class Worker:
    """A process that loads one backend and answers questions.

    Attributes:
        name: Name of the backend.
        failure: One sentence about the error after which the backend stops answering; None while there is none.
    """

    def __init__(self, name: str) -> None:
        """Prepare the process; it starts with the first call."""
        self.name = name
        self.failure: str | None = None
        self._executor = start_process()
        self._at_work = False  # whether a call began and has not returned

    def open(self, settings: WorkerSettings) -> LoadedBackend | None:
        """Load the backend and warm it up; return None when that fails."""
        loaded: LoadedBackend | None = self._call(_open, self.name, settings)
        return loaded

    def answer(self, question: Question, shift: int) -> Measurement | None:
        """Answer with plain decoding and with each tree; return None when the backend has failed, now or before."""
        measurement: Measurement | None = self._call(_answer, self.name, question, shift)
        return measurement

    def close(self) -> None:
        """End the process, at once if it is in the middle of a call that was interrupted."""
        if self._at_work:  # Python 3.14 has `kill_workers`
            for process in list((self._executor._processes or {}).values()):
                process.kill()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self.failure is not None:
            return None
        try:
            self._at_work = True
            with _interrupts_held_back():  # the first call starts the process
                future = self._executor.submit(function, *arguments)
            result = future.result()
        except BrokenExecutor:
            self.failure = (
                f"backend {self.name}: its process ended unexpectedly (killed, out of memory, or a crash of its "
                f"library); look at its last messages, and run it alone: --backends {self.name}"
            )
        except (MedusaError, ProfileError, OSError) as error:
            self.failure = f"backend {self.name}: {error}"
        except Exception as error:  # libraries raise any exception, and the other backends should continue
            text = " ".join(str(error).split())[:300]
            self.failure = (
                f"backend {self.name}: unexpected {type(error).__name__}: {text}; run it alone: --backends {self.name}"
            )
        else:
            self._at_work = False
            return result
        self._at_work = False
        return None


def start_process() -> ProcessPoolExecutor:
    """Create an executor with one new process that shares no memory with this one: a GPU's state survives no fork.

    The process ends with this one, even if this one is killed.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=_end_with_parent)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Let a Ctrl-C wait until the block ends, and reach no process that is started in it.

    A terminal sends it to all processes. The worker's would be in the middle of an import, which prints a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a started process inherits it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """In the worker process: end when the process that started it has ended, whatever ended it."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


_decoders: dict[str, TimedDecoder] = {}  # in the worker process: its only decoder, by the name of its backend


def _open(name: str, settings: WorkerSettings) -> LoadedBackend:
    backend = load_backend(
        settings.bundle, name, settings.precision, settings.threads, settings.max_length, settings.gpu
    )
    _decoders[name] = TimedDecoder(Decoder(backend, accept=ACCEPT_RULES["greedy"]), settings.trees, settings.forced)
    return LoadedBackend(backend.facts(), backend.precision, backend.model.context)


def _answer(name: str, question: Question, shift: int) -> Measurement | None:
    return _decoders[name].answer(question, shift)
