"""The error of everything that reads heads."""

from medusa_runtime.errors import UnsupportedModelError


class HeadsError(UnsupportedModelError):
    """Heads are missing, damaged, of an unknown layout or of another model."""


class RevisionError(HeadsError):
    """A hub repository does not have the revision that was asked for."""
