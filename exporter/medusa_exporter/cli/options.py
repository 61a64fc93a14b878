"""What several commands' options share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import click
from medusa_profiles.profile import TreeProfile
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import BundleError

Command = TypeVar("Command", bound=Callable[..., object])

precision_option = click.option("--precision", help="Of the bundle's graphs. Default: fp32, or the only one.")
gpu_option = click.option(
    "--gpu",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Number of the GPU, as the CUDA driver counts them; a CPU backend uses none.",
)
length_option = click.option(
    "--max-length", type=click.IntRange(min=16), help="Tokens a sequence may come to. Default: the model's context."
)
digest_option = click.option(
    "--expected-digest",
    metavar="SHA256",
    help="Refuse BUNDLE unless its manifest has this digest; inspect shows it.",
)

chat_template_option = click.option(
    "--chat-template",
    metavar="NAME|FILE",
    help="One of the model's chat templates by its name, or a Jinja file. Default: the model's default.",
)


def split_commas(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Flatten an option that may be repeated or comma-separated, empty parts dropped."""
    return tuple(part.strip() for value in values for part in value.split(",") if part.strip())


def split_numbers(least: int) -> Callable[[click.Context, click.Parameter, tuple[str, ...]], tuple[int, ...]]:
    """Make a callback that flattens such an option of whole numbers, each once; `least` is the smallest allowed."""

    def split(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[int, ...]:
        numbers = []
        for part in split_commas(context, parameter, values):
            if not part.isascii() or not part.isdigit() or int(part) < least:
                raise click.BadParameter(f"got {part!r}, expected whole numbers of at least {least}, as in 128,256")
            numbers.append(int(part))
        return tuple(dict.fromkeys(numbers))

    return split


def capacity_options(command: Command) -> Command:
    """Add what an engine is built for."""
    options = (
        length_option,
        click.option(
            "--static-capacity",
            type=click.IntRange(min=1),
            help="Build engines for one length of the past alone, a multiple of 8.",
        ),
        click.option(
            "--target",
            "targets",
            multiple=True,
            callback=split_commas,
            help="GPUs to build for ahead of time: sm86,sm89.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def choose_trees(bundle: Bundle, names: Iterable[str]) -> list[TreeProfile]:
    """Return the named trees of a bundle, each once, or all that it has. Raises BundleError."""
    wanted = list(dict.fromkeys(names)) or bundle.manifest.profiles
    if not wanted:
        raise BundleError(f"{bundle.root} has no profiles, so no tree can be run; build it again with some")
    return [bundle.profile(name) for name in wanted]


class Progress:
    """Lines on standard error, each with the seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._started

    def report(self, line: str) -> None:
        """Print a line."""
        click.echo(f"[{self.seconds:5.1f} s] {line}", err=True)
