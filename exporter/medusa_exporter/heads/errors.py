"""The error of everything that reads heads."""

from medusa_runtime.errors import UnsupportedModelError


class HeadsError(UnsupportedModelError):
    """Heads that are missing, damaged, of an unknown layout or of another model."""
