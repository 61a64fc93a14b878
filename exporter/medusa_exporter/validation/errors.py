"""The error of a build whose graph is not the model."""

from medusa_runtime.errors import MedusaError


class GraphMismatchError(MedusaError):
    """A graph gives other numbers than the model that it was made from; the message names where this begins."""
