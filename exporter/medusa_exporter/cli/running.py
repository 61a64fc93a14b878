"""Runs a command line as a well-behaved process: errors in one line, exit codes, signals, closed pipes."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TextIO

import click
from medusa_profiles.profile import ProfileError
from medusa_runtime.errors import MedusaError, MissingExtraError

from medusa_exporter.cli.advice import for_command_line
from medusa_exporter.cli.command import DEBUG
from medusa_exporter.cli.exit_codes import ExitCode
from medusa_exporter.console import Verbosity, is_utf8, set_verbosity, warn, write
from medusa_exporter.extras import missing_extra

ENDED_BY: dict[int, ExitCode] = {signal.SIGINT: ExitCode.INTERRUPTED, signal.SIGTERM: ExitCode.TERMINATED}


def run(group: click.Group, name: str, arguments: Sequence[str]) -> ExitCode:
    """Run the subcommand of `group` that `arguments` name and return the exit code of the process.

    Results of the command have then been written; a failure has been reported on standard error.
    """
    set_verbosity(Verbosity.NORMAL)
    for stream in (sys.stdout, sys.stderr):
        _replace_unknown_characters(stream)
    options: dict[str, object] = {}
    signals: list[int] = []
    code = ExitCode.SUCCESS
    try:
        with _signals_raise(signals), _runtime_warnings():
            _invoke(group, name, arguments, options)
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and any(map(_has_no_reader, (sys.stdout, sys.stderr))):
            code = ExitCode.CLOSED_PIPE
        elif signals or isinstance(error, KeyboardInterrupt):
            # whatever a library has made of the exception that the signal raised
            code = ENDED_BY[signals[0] if signals else signal.SIGINT]
            _report(code.name.lower(), error, debug=DEBUG in options)
        else:
            code = _exit_code(error)
            _report(_describe(error), error, debug=DEBUG in options)
    for stream in (sys.stdout, sys.stderr):
        if _cannot_flush(stream):
            _discard(stream)
            code = code or ExitCode.FAILURE
    return code


def _invoke(group: click.Group, name: str, arguments: Sequence[str], options: dict[str, object]) -> None:
    """Parse the arguments and call the subcommand. options: filled in with the common options that were used."""
    if f"_{name.replace('-', '_').upper()}_COMPLETE" in os.environ:
        group.main(list(arguments), name)  # prints what the shell completes, and exits
    with group.make_context(name, list(arguments)) as context:
        try:
            group.invoke(context)
        finally:
            options.update(context.meta)


def _exit_code(error: BaseException) -> ExitCode:
    if isinstance(error, click.exceptions.Exit):
        return ExitCode(error.exit_code)
    if isinstance(error, SystemExit):
        return ExitCode.FAILURE if error.code else ExitCode.SUCCESS
    return ExitCode.USAGE if isinstance(error, click.UsageError) else ExitCode.FAILURE


def _describe(error: BaseException) -> str:
    """Return the line that says what went wrong; "" where click prints it or nothing went wrong."""
    if isinstance(error, click.exceptions.Exit | click.ClickException | SystemExit):
        return ""
    if not isinstance(error, MissingExtraError):
        error = missing_extra(error) or error
    if isinstance(error, MedusaError):
        return f"error: {for_command_line(str(error))}"
    if isinstance(error, ProfileError | OSError):
        return f"error: {error}"
    return f"error: unexpected {type(error).__name__}: {error}; run with --debug to see where"


def _report(line: str, error: BaseException, *, debug: bool) -> None:
    """Print what went wrong to standard error: wrong usage as click does, anything else in one line."""
    with contextlib.suppress(OSError):  # standard error may be closed too
        if debug and line:
            write("".join(traceback.format_exception(error)), error=True)
        if isinstance(error, click.ClickException):
            error.show(sys.stderr)
        elif line:
            write(line, error=True)


@contextlib.contextmanager
def _signals_raise(received: list[int]) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt meanwhile, so that unfinished files are removed.

    received: filled in with the signals that arrive. Only a main thread can handle signals.
    """

    def interrupt(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDED_BY}
    for number, handler in before.items():
        if handler not in (None, signal.SIG_IGN):  # nohup ignores them
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # one that was not set by Python stays
                signal.signal(number, handler)


class _Warnings(logging.Handler):
    """Prints warnings as those of the commands."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


@contextlib.contextmanager
def _runtime_warnings() -> Iterator[None]:
    """Print what the runtime warns of, unless the verbosity is quiet."""
    logger, handler = logging.getLogger("medusa_runtime"), _Warnings(logging.WARNING)
    logger.addHandler(handler)
    logger.propagate = False  # --verbose prints the messages of all other loggers
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def _replace_unknown_characters(stream: TextIO | None) -> None:
    """Let a stream write "?" for characters that its encoding does not have, in place of an error."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
        stream.reconfigure(errors="replace" if not is_utf8(stream) else "backslashreplace")


def _has_no_reader(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe that its reader has closed."""
    if stream is None or not hasattr(select, "poll"):  # Windows has no poll
        return False
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(events & select.POLLERR for _, events in poll.poll(0))
    except (OSError, ValueError):  # a stream in memory
        return False


def _cannot_flush(stream: TextIO | None) -> bool:
    """Whether text that was printed cannot be written, for example to a full disk."""
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError):
        return True
    return False


def _discard(stream: TextIO | None) -> None:
    """Throw away what cannot be written, so that the end of the process does not try it again and complain."""
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
