"""A request as the scheduler sees it: token ids, parameters, limits, and where its output goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from medusa_profiles.profile import TreeProfile

from medusa_runtime.mailbox import Mailbox
from medusa_runtime.sampling_params import SamplingParams
from medusa_runtime.structured.compiler import Grammar

Checkpoint = Callable[[], None]  # raises the error that ends the work in progress, if there is one


class Job(Protocol):
    """Work for the scheduler's thread.

    Attributes:
        deadline: Time of `time.monotonic` at which it ends; None has no limit.
        is_cancelled: Set from any thread.
    """

    deadline: float | None
    is_cancelled: bool

    def run(self, checkpoint: Checkpoint) -> None:
        """Do the work in the scheduler's thread; call `checkpoint` between its parts."""

    def fail(self, error: BaseException) -> None:
        """Report the error that ended the work before or while it was done."""


class RequestWorker(Protocol):
    """Generates the answers of requests."""

    def answer(self, request: Request, checkpoint: Checkpoint) -> None:
        """Generate all answers of a request and put them into its mailbox; called by the scheduler's thread."""

    def fail(self, request: Request, error: BaseException) -> None:
        """End a request with an error."""


@dataclass(eq=False)
class Request:
    """One request.

    Args:
        number: Unique in its engine.
        prompt: Token ids.
        params: The parameters.
        seed: The seed, drawn if the parameters have none.
        tree: The tree that its steps verify, if `draft` is "heads".
        draft: What its steps verify, one of `sampling_params.DRAFTS`.
        bad_words: Token ids of the words that the answer must not contain.
        deadline: Time of `time.monotonic` at which it ends; None has no limit.
        submitted: Time of `time.perf_counter` at which it was submitted.
        worker: Generates the answers.
        grammar: What the answers have to match, compiled; None if they may be anything.
    """

    number: int
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    tree: TreeProfile
    draft: str
    bad_words: tuple[tuple[int, ...], ...]
    deadline: float | None
    submitted: float
    worker: RequestWorker
    grammar: Grammar | None = None
    mailbox: Mailbox = field(default_factory=Mailbox)
    is_cancelled: bool = False

    def run(self, checkpoint: Checkpoint) -> None:
        """Generate the answers."""
        self.worker.answer(self, checkpoint)

    def fail(self, error: BaseException) -> None:
        """Report an error to the reader."""
        self.worker.fail(self, error)
