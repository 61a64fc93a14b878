"""The class of every subcommand: it adds the options that all of them accept."""

from __future__ import annotations

import logging
import textwrap
from collections import Counter
from typing import Any

import click

from medusa_exporter.console import Verbosity, set_verbosity

DEBUG, QUIET, VERBOSE = (f"medusa_exporter.{name}" for name in ("debug", "quiet", "verbose"))


def _remember(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Store that a common option was used, before or after the subcommand, and set the verbosity."""
    if not value:
        return
    context.meta[f"medusa_exporter.{parameter.name}"] = True
    if context.meta.get(QUIET) and context.meta.get(VERBOSE):
        raise click.UsageError("--quiet and --verbose exclude each other; leave out one of the two", context)
    if context.meta.get(QUIET):
        set_verbosity(Verbosity.QUIET)
    if context.meta.get(VERBOSE):
        set_verbosity(Verbosity.VERBOSE)
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")


def common_options() -> list[click.Option]:
    """Return new options that are accepted before the subcommand and after it."""
    settings: dict[str, Any] = {"is_flag": True, "expose_value": False, "callback": _remember}
    return [
        click.Option(["-q", "--quiet"], help="Print results and errors only: no progress, no warnings.", **settings),
        click.Option(["-v", "--verbose"], help="Print the messages of libraries too.", **settings),
        click.Option(["--debug"], help="Show the Python traceback of an error.", **settings),
    ]


class Command(click.Command):
    """A subcommand with the common options behind its own."""

    def __init__(self, name: str | None, *, example: str = "", **options: Any) -> None:
        """Create it as click does. example: a command line to show below the options."""
        super().__init__(name, **options)
        if example:
            self.epilog = "\b\nExample:\n" + textwrap.indent(example, "  ")  # \b keeps the lines as they are
        self.params += common_options()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; refuse to repeat an option of one value, of which click would take the last."""
        if not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(list(args))
            for parameter, count in Counter(order).items():
                if isinstance(parameter, click.Option) and count > 1 and not (parameter.multiple or parameter.is_flag):
                    raise click.UsageError(f"{parameter.opts[0]} is given {count} times, expected once", ctx)
        return super().parse_args(ctx, args)


class Group(click.Group):
    """A subcommand that has subcommands itself, with the common options too."""

    command_class = Command

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Create it as click does, with more options."""
        super().__init__(*arguments, **options)
        self.params += common_options()
