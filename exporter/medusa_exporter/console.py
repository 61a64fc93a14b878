"""Text for people: tables for standard output, progress and warnings for standard error, both drawn by rich."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0  # of a progress bar where there is no terminal to draw it on
IN_ASCII = str.maketrans({"│": "|", "├": "|", "└": "`", "─": "-", "–": "-", "×": "x", "…": "...", "−": "-"})
UNLIMITED = 10_000  # columns of a table that goes into a file or a pipe: nothing is cut or wrapped


class Verbosity(IntEnum):
    """How much is printed to standard error: errors only, progress too, or the messages of libraries as well."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


class _Settings:
    verbosity = Verbosity.NORMAL


def set_verbosity(verbosity: Verbosity) -> None:
    """Set how much this process prints to standard error, as `--quiet` and `--verbose` do."""
    _Settings.verbosity = verbosity


def verbosity() -> Verbosity:
    """Return how much this process prints to standard error."""
    return _Settings.verbosity


def table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, text: Collection[str] | None = None, title: str = ""
) -> str:
    """Format a table for standard output.

    On a terminal it has a rule below its headings, and long texts are folded to the width of the terminal; figures are
    never cut. Elsewhere it is plain text: one line for the headings and one for each row, of any width.

    Args:
        headings: One for each column.
        rows: The cells, as many in each row as there are headings.
        text: Headings of the columns that hold text, which is aligned to the left; figures are aligned to the right.
            Default: the first column only.
        title: A line above the table.
    """
    from rich.box import ASCII2, SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout is not None and sys.stdout.isatty()
    texts = headings[:1] if text is None else text
    drawn = Table(
        box=(SIMPLE_HEAD if is_utf8(sys.stdout) else ASCII2) if terminal else None,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1) if terminal else (0, 2, 0, 0),
        header_style="bold" if terminal else "",
    )
    for heading in headings:
        if heading in texts:
            drawn.add_column(heading, overflow="fold")
        else:
            drawn.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    options: dict[str, Any] = {"markup": False, "highlight": False, "emoji": False}
    console = Console(force_terminal=None if terminal else False, **options)
    # rich assumes 80 columns where there is no terminal, and cuts figures where there are too few
    width = max(console.width, console.measure(drawn).minimum) if terminal else UNLIMITED
    console = Console(width=width, force_terminal=terminal, no_color=True if not terminal else None, **options)
    with console.capture() as captured:
        console.print(drawn)
    lines = [title, *captured.get().splitlines()] if title else captured.get().splitlines()
    return "\n".join(line.rstrip() for line in lines)


def write(text: str, *, newline: bool = True, error: bool = False) -> None:
    """Write text to standard output, or with `error` to standard error, at once.

    Lines and dashes that the encoding of the stream does not have are drawn in ASCII. `click.echo` would write UTF-8 to
    a stream whose encoding is ASCII.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is not None:
        text = readable(text)
        try:
            text.encode(getattr(stream, "encoding", None) or "utf-8")
        except UnicodeEncodeError:
            text = text.translate(IN_ASCII)
        stream.write(f"{text}\n" if newline else text)
        stream.flush()


def readable(text: str) -> str:
    """Return a text with file names in UTF-8, whose bytes Python keeps one by one where the locale is another one.

    What is not UTF-8 becomes U+FFFD.
    """
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def note(text: str) -> None:
    """Print a line to standard error, unless the verbosity is quiet."""
    if verbosity() > Verbosity.QUIET:
        _standard_error().print(text, soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning to standard error, unless the verbosity is quiet."""
    note(f"warning: {text}")


class Progress:
    """Progress of one command on standard error: lines that begin with the seconds since it was created, and bars.

    Nothing is printed where the verbosity is quiet.
    """

    def __init__(self) -> None:
        """Start to count the seconds."""
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the object was created."""
        return time.monotonic() - self._started

    def report(self, line: str) -> None:
        """Print one line."""
        note(f"[{self.seconds:5.1f} s] {line}")

    @contextlib.contextmanager
    def bar(self, label: str, total: float, unit: str = "") -> Iterator[Bar]:
        """Show how much of `total` is done: as a bar on a terminal, elsewhere as a line every ten seconds.

        Args:
            label: What is being done.
            total: The amount of work, in `unit`s.
            unit: A plural noun, e.g. "tokens".
        """
        console = _standard_error()
        if verbosity() == Verbosity.QUIET or not console.is_terminal:
            yield _LineBar(self, label, total, unit)
            return
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        amount = TextColumn("{task.completed:,.0f} of {task.total:,.0f} " + unit)
        columns = TextColumn("{task.description}"), BarColumn(), amount
        with Bars(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
            yield _DrawnBar(bars, bars.add_task(label, total=total))


class Bar(Protocol):
    """How far a piece of work is; see `Progress.bar`."""

    def advance(self, amount: float = 1) -> None:
        """Add to what is done."""


class _DrawnBar:
    def __init__(self, bars: Any, task: Any) -> None:
        self._bars, self._task = bars, task

    def advance(self, amount: float = 1) -> None:
        self._bars.advance(self._task, amount)


class _LineBar:
    def __init__(self, progress: Progress, label: str, total: float, unit: str) -> None:
        self._progress, self._label, self._total, self._unit = progress, label, total, unit
        self._done, self._started = 0.0, time.monotonic()
        self._next = self._started + SECONDS_BETWEEN_LINES

    def advance(self, amount: float = 1) -> None:
        self._done += amount
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + SECONDS_BETWEEN_LINES
        share = self._done / self._total if self._total else 1.0
        left = (now - self._started) * (1 - share) / share if share else 0.0
        amount_done = f"{self._done:,.0f} of {self._total:,.0f} {self._unit}".rstrip()
        self._progress.report(f"{self._label}: {amount_done} ({share:.0%}), about {left:,.0f} s left")


def is_utf8(stream: TextIO | None) -> bool:
    """Whether a stream can hold every character."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return encoding.lower().replace("-", "").replace("_", "") in ("utf8", "utf8sig", "cp65001")


@cache
def _standard_error() -> Console:
    """The one console that progress goes through, so that lines appear above a bar that is being drawn."""
    from rich.console import Console

    class OpenEnded(Console):
        def on_broken_pipe(self) -> None:  # rich would end the process with exit code 1, and discard standard output
            raise  # noqa: PLE0704 -- called while the BrokenPipeError is handled

    return OpenEnded(stderr=True, markup=False, highlight=False, emoji=False)
