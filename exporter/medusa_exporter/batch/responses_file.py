"""Writes the responses of a batch, line by line, so that a command that was interrupted goes on behind them."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from medusa_profiles.profile import shown
from medusa_runtime.errors import BusyError

from medusa_exporter.batch.identity import BatchIdentity, line_id
from medusa_exporter.batch.requests_file import BatchError, BatchRequest
from medusa_exporter.output_kinds import BATCH, BATCH_PART
from medusa_exporter.overwrite_check import check_output_file
from medusa_exporter.wording import counted

if sys.platform != "win32":
    import fcntl

REMEDY = "give the same input, bundle and options to resume it, another output, or --force to answer all requests anew"


@dataclass(frozen=True)
class Finished:
    """Responses that are in a file.

    Attributes:
        statuses: Number of responses by their status code.
        size: Bytes of their lines.
        is_whole: Whether the file has nothing behind them.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    size: int = 0
    is_whole: bool = True

    @property
    def count(self) -> int:
        """Number of responses."""
        return self.statuses.total()


@dataclass(frozen=True)
class ResponsesFile:
    """The output of a batch: unfinished in `part`, then renamed.

    Attributes:
        path: Where the complete output goes; not a link.
        shown: The same as the user wrote it, for messages.
    """

    path: Path
    shown: Path

    @classmethod
    def at(cls, path: Path) -> ResponsesFile:
        """Return the output at `path`; a link is followed."""
        return cls(Path(os.path.realpath(path)), path)

    @property
    def part(self) -> Path:
        """The file of a batch that is not finished."""
        return self.path.with_name(f"{self.path.name}.part")

    def check(self, *, inputs: Iterable[Path], bundle: Path) -> None:
        """Refuse to overwrite what no batch has written. Raises what `check_output_file` does."""
        files = tuple(inputs)
        check_output_file(self.shown, BATCH, inputs=files, bundle=bundle)
        check_output_file(self.part, BATCH_PART, inputs=files, bundle=bundle)

    def is_up_to_date(self, requests: Iterable[BatchRequest], identity: BatchIdentity) -> Finished | None:
        """Return the complete output of these requests, or None if there is no output.

        Raises:
            BatchError: The output belongs to something else, or is damaged.
        """
        if not self.path.exists() or not self.path.stat().st_size or self.part.exists():
            return None
        remaining = iter(requests)
        finished = count_finished(self.path, self.shown, remaining, identity)
        if not finished.is_whole or next(remaining, None) is not None:
            count = counted(finished.count, "response")
            raise BatchError(
                f"{self.shown} has {count}, expected one to each request: it was damaged, or is of another input; "
                f"{REMEDY}"
            )
        return finished

    @contextmanager
    def open_part(self) -> Iterator[FileIO]:
        """Open and lock the unfinished output; an empty one is removed at the end.

        Raises:
            BusyError: Another command is writing to it.
            BatchError: It cannot be opened.
        """
        with self._failures_are_explained():
            self.part.parent.mkdir(parents=True, exist_ok=True)
            opened = self.part.open("ab+", buffering=0)  # a write that failed is not tried again when it is closed
        with opened as file:
            self._lock(file)
            try:
                yield file
            finally:
                if not file.closed:
                    self._remove_empty(file)

    def append(self, file: FileIO, line: bytes) -> None:
        """Write a response to the unfinished output; raise BatchError if that fails."""
        with self._failures_are_explained():
            while line:
                line = line[file.write(line) :]

    def cut(self, file: FileIO, size: int) -> None:
        """Drop what is behind the first `size` bytes of the unfinished output; raise BatchError if that fails."""
        with self._failures_are_explained():
            file.truncate(size)
            file.seek(size)

    def publish(self, file: FileIO) -> None:
        """Give the finished output, which `open_part` has opened, its name; raise BatchError if that fails."""
        with self._failures_are_explained():
            os.fsync(file.fileno())
            if sys.platform == "win32":  # which renames no open file
                file.close()
            self.part.replace(self.path)

    @contextmanager
    def _failures_are_explained(self) -> Iterator[None]:
        """Turn an error of the file system, such as a full disk, into one that says what stays and what to do."""
        try:
            yield
        except OSError as error:
            raise BatchError(
                f"{self.part} cannot be written as the output {self.shown}: {error.strerror or error}; the responses "
                "that it has are kept: mend the cause, such as a full disk, then repeat the command to resume it"
            ) from error

    def _lock(self, file: FileIO) -> None:
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_mine = False
        except OSError:  # a file system without locks
            return
        else:
            is_mine = self._is_current(file)
        if not is_mine:
            raise BusyError(
                f"another command is writing to {self.shown}, or has just finished it; nothing was written: wait until "
                "it has ended, then run this again, or give another output"
            )

    def _is_current(self, file: FileIO) -> bool:
        """Whether the file has not been renamed or removed since it was opened."""
        try:
            return os.path.samestat(self.part.stat(), os.fstat(file.fileno()))
        except FileNotFoundError:
            return False

    def _remove_empty(self, file: FileIO) -> None:
        if os.fstat(file.fileno()).st_size == 0 and self._is_current(file):
            if sys.platform == "win32":  # which removes no open file
                file.close()
            self.part.unlink(missing_ok=True)


def count_finished(path: Path, shown: Path, requests: Iterator[BatchRequest], identity: BatchIdentity) -> Finished:
    """Count the responses in a file, which must be those to the first of `requests`; a damaged last line is not one.

    Args:
        path: The file.
        shown: How messages call it.
        requests: The requests; as many are taken as there are responses.
        identity: What the responses must depend on.

    Raises:
        BatchError: A response belongs to something else, or a line that is not the last one is damaged.
    """
    statuses, size, number = Counter[int](), 0, 0
    with path.open("rb") as file:
        while line := file.readline():
            number += 1
            content = _read_line(line)
            if content is None:
                if file.read(1):
                    raise BatchError(f"{shown}:{number} is damaged; give another output, or --force to start anew")
                return Finished(statuses, size, is_whole=False)
            request = next(requests, None)
            if request is None:
                raise BatchError(
                    f"{shown} has more responses than there are requests: it is of another input; {REMEDY}"
                )
            if difference := _difference(content, request, identity):
                raise BatchError(
                    f"{shown}:{number} is of {difference}, expected the response to line {request.line} of the "
                    f"input; {REMEDY}"
                )
            statuses[content["response"]["status_code"]] += 1
            size += len(line)
    return Finished(statuses, size)


def _read_line(line: bytes) -> dict[str, Any] | None:
    """Return a response; None if the line is damaged."""
    try:
        content = json.loads(line) if line.endswith(b"\n") else None
        complete = isinstance(content, dict) and isinstance(content["response"]["status_code"], int)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return content if complete else None


def _difference(content: dict[str, Any], request: BatchRequest, identity: BatchIdentity) -> str | None:
    """Describe what else a response belongs to; None if it is the one to the request."""
    expected, found = line_id(identity.request_id(request.data)), str(content.get("id"))
    if found == expected and content.get("custom_id") != request.custom_id:
        return f"the custom_id {shown(content.get('custom_id'))} in place of {shown(request.custom_id)}"
    return identity.describe_difference(found.removeprefix(line_id("")), expected.removeprefix(line_id("")))


def encode_line(request: BatchRequest, request_id: str, status: int, body: dict[str, Any]) -> bytes:
    """Return the output line of a response."""
    content = {
        "id": line_id(request_id),
        "custom_id": request.custom_id,
        "response": {"status_code": status, "request_id": request_id, "body": body},
        "error": None,
    }
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace") + b"\n"  # a lone surrogate becomes its escape in JSON
