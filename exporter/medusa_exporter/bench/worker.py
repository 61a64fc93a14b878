"""A backend in a process of its own: two libraries never share one, and one that dies takes no other with it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
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
    """What a backend is loaded with, each the same for all of a run; None where the bundle or the library chooses.

    max_length: tokens a sequence may come to. recording: how many tokens steps keep, where the heads have no say. gpu:
    the number of the one that GPU backends run on.
    """

    bundle: Bundle
    trees: Sequence[TreeProfile]
    precision: str | None = None
    threads: int | None = None
    max_length: int | None = None
    recording: RecordedAcceptance | None = None
    gpu: int = 0


class LoadedBackend(NamedTuple):
    """A loaded backend. context: tokens that it takes, fewer than the model's where it was built for fewer."""

    facts: BackendFacts
    precision: str
    context: int


class Worker:
    """One backend, loaded once, that answers questions; `failure` says in one sentence why it does so no more."""

    def __init__(self, name: str) -> None:
        """Start nothing yet."""
        self.name = name
        self.failure: str | None = None
        self._executor = start_process()

    def open(self, setup: WorkerSettings) -> LoadedBackend | None:
        """Load the backend and warm it up; None where it failed."""
        opened: LoadedBackend | None = self._call(_open, self.name, setup)
        return opened

    def answer(self, question: Question, shift: int) -> Measurement | None:
        """Answer by plain decoding and by every tree; None where it has failed."""
        turn: Measurement | None = self._call(_answer, self.name, question, shift)
        return turn

    def close(self) -> None:
        """End the process."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self.failure is not None:
            return None
        try:
            return self._executor.submit(function, *arguments).result()
        except BrokenExecutor:
            self.failure = (
                f"backend {self.name}: its process died (killed, out of memory, or a crash of its library); look at "
                f"what it printed, and try it alone: --backends {self.name}"
            )
        except (MedusaError, ProfileError, OSError) as error:
            self.failure = f"backend {self.name}: {error}"
        except Exception as error:  # a library raises what it likes, and the other backends are to go on
            text = " ".join(str(error).split())[:300]
            self.failure = (
                f"backend {self.name}: unexpected {type(error).__name__}: {text}; try it alone: --backends {self.name}"
            )
        return None


def start_process() -> Executor:
    """A process that begins anew, with nothing of this one in its memory: a GPU's state does not survive a fork."""
    return ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))


_runners: dict[str, TimedDecoder] = {}  # of this process: one, by its backend's name


def _open(name: str, setup: WorkerSettings) -> LoadedBackend:
    backend = load_backend(setup.bundle, name, setup.precision, setup.threads, setup.max_length, setup.gpu)
    _runners[name] = TimedDecoder(Decoder(backend, accept=ACCEPT_RULES["greedy"]), setup.trees, setup.recording)
    return LoadedBackend(backend.facts(), backend.precision, backend.model.context)


def _answer(name: str, question: Question, shift: int) -> Measurement | None:
    return _runners[name].answer(question, shift)
