"""The exit codes of `medusa-export`, which are the same for every command."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a process of `medusa-export` ends with. Codes above 128 are 128 plus the number of a signal."""

    SUCCESS = 0
    FAILURE = 1
    USAGE = 2
    INTERRUPTED = 130
    CLOSED_PIPE = 141
    TERMINATED = 143


MEANINGS = {
    ExitCode.SUCCESS: "Success: the command did what was asked, and every check passed.",
    ExitCode.FAILURE: "Failure, or a check (verify, compare, bench) that did not pass.",
    ExitCode.USAGE: "Wrong usage: an unknown option or value, or options that exclude each other.",
    ExitCode.INTERRUPTED: "Interrupted with Ctrl-C.",
    ExitCode.CLOSED_PIPE: "The reader of the output closed the pipe, as head does.",
    ExitCode.TERMINATED: "Terminated with SIGTERM.",
}
