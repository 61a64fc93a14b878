"""What several commands' options share."""

from __future__ import annotations

import click


def split_commas(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Flatten an option that may be repeated or comma-separated, empty parts dropped."""
    return tuple(part.strip() for value in values for part in value.split(",") if part.strip())
