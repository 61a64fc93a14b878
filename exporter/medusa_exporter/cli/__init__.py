"""The `medusa-export` command: one module for each subcommand, imported only when that subcommand is called.

Every command ends with one of the exit codes of `exit_codes`. Results go to standard output, everything else to
standard error.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import click

from medusa_exporter.cli.command import common_options
from medusa_exporter.cli.exit_codes import MEANINGS
from medusa_exporter.cli.running import run

NAME = "medusa-export"
COMMANDS = {
    "bench": "Measure the speed of tree decoding compared with plain decoding.",
    "build": "Build a bundle from a model, with or without Medusa heads.",
    "calibrate": "Measure step times and head accuracy on this machine.",
    "compare": "Compare the output tensors of two backends or precisions.",
    "distill": "Generate the conversations that heads are trained on.",
    "engines": "Build the TensorRT engines of a bundle.",
    "generate": "Answer one prompt with a bundle.",
    "heads": "Convert Medusa heads from any published layout.",
    "heads-report": "Measure how well heads predict, and fit trees to them.",
    "inspect": "Check a bundle and show its contents.",
    "profiles": "List the trees that come with medusa-export, or draw one.",
    "report": "Write an HTML page of the results of bench.",
    "search-tree": "Find the fastest tree for this machine.",
    "train": "Train Medusa heads on distilled conversations.",
    "verify": "Check that tree decoding gives the tokens of the model.",
}


class LazyGroup(click.Group):
    """A group that imports a subcommand when it is called: `heads-report` is `command` in `heads_report.py`."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the names, sorted, without importing anything."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import and return one subcommand, or None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"{__name__}.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the command list from the table above, so that --help stays fast."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the exit codes."""
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(int(code)), meaning) for code, meaning in MEANINGS.items()])
        super().format_epilog(ctx, formatter)


@click.group(cls=LazyGroup, params=common_options())
@click.version_option(package_name=NAME)
def group() -> None:
    """Export a language model with Medusa heads into one ONNX graph, then verify, run and measure it.

    The options -q, -v and --debug may stand before or after the command.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with one of the codes of `exit_codes`; an error is one line on standard error."""
    sys.exit(run(group, NAME, sys.argv[1:] if arguments is None else arguments))
