"""The `medusa-export` command: one file per subcommand, imported only when it is called."""

from __future__ import annotations

import importlib
import sys

import click
from medusa_profiles.profile import ProfileError
from medusa_runtime.errors import MedusaError

COMMANDS = {
    "bench": "Time tree decoding against plain decoding, on several backends.",
    "build": "Make a bundle: one graph with heads, tokenizer, profiles.",
    "compare": "Compare two backends' outputs, tensor by tensor.",
    "distill": "Let the model answer prompts: the data heads are trained on.",
    "engines": "Build a bundle's TensorRT engines.",
    "generate": "Answer one prompt, streamed.",
    "heads": "Convert heads of any published layout.",
    "heads-report": "How well heads guess, and the trees that suit them.",
    "inspect": "Show what a bundle holds.",
    "profiles": "List the shipped trees, or draw one.",
    "report": "Draw what bench measured, of several runs too: one page.",
    "train": "Train heads on distilled data, the decoder frozen.",
    "verify": "Check that tree decoding gives the model's own tokens.",
}


class LazyGroup(click.Group):
    """A group whose subcommands live in modules of their own: `heads-report` is `command` in `heads_report.py`."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the names, sorted, without importing anything."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import and return one subcommand, or None for a name that is none."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"{__name__}.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the command list from the table above, so that --help stays fast."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=LazyGroup)
@click.version_option(package_name="medusa-export")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def group(debug: bool) -> None:
    """Medusa speculative decoding as one ONNX graph: build, verify, run and measure bundles."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: exit code 0 for success, 1 for a failure that is told in one line, 2 for bad usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--debug" in arguments:
        group(arguments)
    try:
        group(arguments)
    except (MedusaError, ProfileError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except Exception as error:  # the last net: a user never meets a traceback unasked
        click.echo(f"error: unexpected {type(error).__name__}: {error}; run with --debug to see where", err=True)
        sys.exit(1)
