"""The error of a build in which a graph differs from the model."""

from medusa_runtime.errors import MedusaError


class GraphMismatchError(MedusaError):
    """A graph computes other values than the model that it was exported from; the message names where this begins."""
