"""The errors that callers can catch; each message states what was found, what was expected and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medusa_runtime.results import GenerationResult


class MedusaError(Exception):
    """Base class of all errors caused by the input or the machine; anything else is a bug."""


class BundleError(MedusaError):
    """A bundle is missing or damaged, has another schema, or lacks what was requested."""


class CapacityError(MedusaError):
    """A prompt or an answer does not fit the model's context or the machine's memory."""


class MissingExtraError(MedusaError):
    """An optional dependency is not installed; the message names the pip command."""


class UnsupportedModelError(MedusaError):
    """A model, head layout or option is not supported; reported before any work starts."""


class PromptError(MedusaError):
    """A prompt is empty or invalid, or the chat template cannot render it."""


class TemplateProcessError(PromptError):
    """The process that renders chat templates cannot be started, or was ended from outside."""


class ArgumentError(MedusaError):
    """An argument has another type than documented, or is out of range."""


class BusyError(MedusaError):
    """Another caller is using the engine, decoder, backend or folder. Nothing has changed; try again later."""


class QueueFullError(MedusaError):
    """The engine's queue of waiting requests is full. Nothing was started; try again later."""


class ForkedProcessError(MedusaError):
    """An engine was used in a child process of the one that loaded it; its thread does not exist there."""


class RequestError(MedusaError):
    """A request ended before its answer was complete.

    Attributes:
        result: What was generated before; its first answer may have no token. None where there was no request yet.
    """

    def __init__(self, message: str, result: GenerationResult | None = None) -> None:
        super().__init__(message)
        self.result = result


class RequestCancelledError(RequestError):
    """A request was cancelled by its caller."""


class EngineClosedError(RequestError):
    """The engine was closed before or while it worked on a request."""


class DeadlineError(RequestError):
    """A request's deadline passed before its answer was complete."""


class WrongThreadError(MedusaError):
    """A backend that runs all steps in one thread was called from another thread."""


class BackendError(MedusaError):
    """The library that runs the graph failed during a step."""


class InvalidLogitsError(MedusaError):
    """A step computed NaN, infinite or constant logits: the graph does not compute the model in this precision."""


class CalibrationError(MedusaError):
    """A calibration is missing or damaged, or belongs to another bundle."""
