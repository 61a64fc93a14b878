"""The results of a command: text for people, and JSON for programs where `--json FILE` asks for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from medusa_runtime.errors import MedusaError

from medusa_exporter.console import Verbosity, is_utf8, readable, verbosity, write
from medusa_exporter.files import write_json
from medusa_exporter.overwrite_check import JsonKind, check_output_file

Decorated = TypeVar("Decorated", bound=Callable[..., object])
STANDARD_OUTPUT = "-"


class Results:
    """Where the results of one command go.

    Text goes to standard output, unless `--json -` sends JSON there: then text goes to standard error, and nothing but
    the JSON is written to standard output.
    """

    def __init__(self, json_file: Path | None) -> None:
        """Take the value of `--json`, None where it was not given."""
        self._file = None if json_file is None or str(json_file) == STANDARD_OUTPUT else json_file
        self._json_on_stdout = json_file is not None and self._file is None

    @property
    def file(self) -> Path | None:
        """The file that the JSON is written to, if it is one."""
        return self._file

    @property
    def wants_json(self) -> bool:
        """Whether `--json` was given."""
        return self._file is not None or self._json_on_stdout

    def check(
        self,
        kind: JsonKind,
        *,
        inputs: Iterable[Path] = (),
        outputs: Iterable[Path] = (),
        bundle: Path | None = None,
    ) -> None:
        """Check before any work that the file may be written. Raises what `overwrite_check.check_output_file` does."""
        if self._file is not None:
            check_output_file(self._file, kind, inputs=inputs, outputs=outputs, bundle=bundle)

    def echo(self, text: str, *, newline: bool = True) -> None:
        """Print text for people at once."""
        if not self._json_on_stdout:
            write(text, newline=newline)
        elif verbosity() > Verbosity.QUIET:
            write(text, newline=newline, error=True)

    def save(self, kind: JsonKind, content: Mapping[str, Any]) -> None:
        """Write what is known so far into the file, if JSON goes into a file: an interrupted command then keeps it.

        Raises:
            MedusaError: It cannot be written.
        """
        if self._file is None:
            return
        try:
            write_json(self._file, _readable(kind.marked(content)))
        except OSError as error:
            raise MedusaError(
                f"{self._file} cannot be written: {error.strerror or error}; mend the cause, such as a full disk, or "
                "give --json another file, then repeat the command"
            ) from error

    def write(self, kind: JsonKind, content: Mapping[str, Any]) -> None:
        """Write the JSON if `--json` asks for it; it names the command that wrote it."""
        self.save(kind, content)
        if self._json_on_stdout:
            # A terminal or pipe that is not UTF-8 gets escapes in place of characters that it cannot hold.
            found = _readable(kind.marked(content))
            write(json.dumps(found, indent=2, allow_nan=False, ensure_ascii=not is_utf8(sys.stdout)))


def _readable(value: Any) -> Any:
    """Return JSON values with all file names in them as UTF-8, see `console.readable`."""
    if isinstance(value, Mapping):
        return {readable(key): _readable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(one) for one in value]
    return readable(value) if isinstance(value, str) else value


def _as_results(_context: click.Context, _parameter: click.Parameter, value: Path | None) -> Results:
    return Results(value)


def json_option(what: str) -> Callable[[Decorated], Decorated]:
    """Create the option `--json FILE`; the command gets a `Results` as the argument `results`.

    Args:
        what: What is written, for the help text: a noun phrase.
    """
    return click.option(
        "--json",
        "results",
        metavar="FILE",
        type=click.Path(path_type=Path),
        callback=_as_results,
        help=f"Also write {what} to FILE as JSON. With - the JSON goes to standard output, and all text to standard "
        "error.",
    )
