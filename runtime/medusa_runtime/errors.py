"""The errors a user can meet. Each message says what was got, what was expected and what to do."""

from __future__ import annotations


class MedusaError(Exception):
    """Base of every error that is the input's or the machine's fault, not the program's."""


class BundleError(MedusaError):
    """A bundle is missing, damaged, foreign or lacks what was asked of it."""


class CapacityError(MedusaError):
    """A prompt or an answer does not fit the model's context or the machine's memory."""


class MissingExtraError(MedusaError):
    """An optional dependency is not installed; the message names the pip command."""


class UnsupportedModelError(MedusaError):
    """A model, head layout or option that this project cannot serve; refused by name before any work."""


class PromptError(MedusaError):
    """A prompt that holds nothing to decode or cannot be laid out."""


class ArgumentError(MedusaError):
    """An argument is of another type, or outside of the range, that is documented."""


class BusyError(MedusaError):
    """Something else is using a decoder, engine, backend or folder. Nothing has changed; try again later."""


class WrongThreadError(MedusaError):
    """A backend whose state belongs to one thread was asked to run a step in another one."""


class BackendError(MedusaError):
    """The library that runs the graph failed while it ran a step."""


class InvalidLogitsError(MedusaError):
    """A step gave logits that are NaN or infinite: the graph does not compute the model."""
