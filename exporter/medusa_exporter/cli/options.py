"""What several commands' options share."""

from __future__ import annotations

import click

precision_option = click.option("--precision", help="Of the bundle's graphs. Default: fp32, or the only one.")


def split_commas(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Flatten an option that may be repeated or comma-separated, empty parts dropped."""
    return tuple(part.strip() for value in values for part in value.split(",") if part.strip())
