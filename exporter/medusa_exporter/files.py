"""Writes files atomically: a reader finds the previous file or all of the new one, even if the writer is killed."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from medusa_runtime.errors import BusyError

from medusa_exporter.folder_lock import hold_lock
from medusa_exporter.staging import MARK, Staging, finish_move, staged_files

if sys.platform != "win32":
    import fcntl

WAIT = 600.0  # seconds for another writer of a folder to end, before one gives up
_BLOCK = 4 << 20  # bytes read and hashed at a time
_INTEGERS = re.compile(r"\[\n[\s\d,-]+\]")  # a list of integers over several lines; no JSON string has a line break


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a scratch file next to `path` that replaces it when the block ends, and is removed if the block raises.

    The folder is created. If `path` is a link, the file that it leads to is replaced and the link is kept. Scratch
    files that killed processes have left are removed. Raises OSError.
    """
    place = Path(os.path.realpath(path))
    place.parent.mkdir(parents=True, exist_ok=True)
    _sweep(place)
    scratch, opened = _opened(place)
    try:
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if sys.platform != "win32":
                scratch.replace(place)
        if sys.platform == "win32":  # which renames no open file
            scratch.replace(place)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def atomic_write_files(folder: Path) -> Iterator[Path]:
    """Yield an empty folder whose files appear in `folder` together when the block ends, or not at all if it raises.

    The files must not be in subfolders. A second writer of the folder waits for the first one. A process that is killed
    while it moves the files leaves the rest to `finish_interrupted_write`, which the next reader or writer calls.

    Raises:
        OSError: If something cannot be written.
        BusyError: If another command still writes to the folder after WAIT seconds.
    """
    staging = Staging(folder, inside=True)
    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(hold_lock(staging.lock, remove_folder=True, timeout=WAIT))
        except TimeoutError:
            raise BusyError(
                f"another command is writing to {folder}, for more than {WAIT:.0f} seconds; nothing was written: "
                "wait until it has ended, then run this again, or give another folder"
            ) from None
        finish_move(staging)
        with staged_files(staging) as new:
            yield new
            for path in new.iterdir():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())


def finish_interrupted_write(folder: Path) -> None:
    """Move finished files to `folder` that a killed `atomic_write_files` has left in its staging folder. OSError."""
    finish_move(Staging(folder, inside=True))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path` atomically, as strict JSON indented by 2, with each list of integers on one line.

    Raises ValueError or TypeError for what JSON cannot represent.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    text = _INTEGERS.sub(lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text)
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with atomic_write(path) as file:
        file.write(content)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_can_create(path: Path) -> None:
    """Create and remove a scratch file next to `path`; raise OSError, before hours of work, if that is not possible."""
    scratch = _scratch(path)
    scratch.touch(exist_ok=False)
    scratch.unlink()


def _scratch(place: Path) -> Path:
    return place.with_name(f".{place.name}.{MARK}-{secrets.token_hex(4)}.tmp")


def _opened(place: Path) -> tuple[Path, BinaryIO]:
    """Create and lock a scratch file, again if another process removed it before it was locked. Raises OSError."""
    while True:
        scratch = _scratch(place)
        file = scratch.open("xb")
        try:
            _lock(file)
            if sys.platform == "win32" or os.path.samestat(scratch.stat(), os.fstat(file.fileno())):
                return scratch, file
            file.close()
        except FileNotFoundError:
            file.close()
        except BaseException:
            file.close()
            scratch.unlink(missing_ok=True)
            raise


def _lock(file: BinaryIO) -> None:
    """Lock a scratch file until it is closed, so that other processes leave it; Windows removes no file that is open.

    Not by filelock, whose lock would be a second file to create and remove for every output.
    """
    if sys.platform != "win32":
        with contextlib.suppress(OSError):  # a file system without locks, where no process removes scratch files
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)


def _sweep(place: Path) -> None:
    """Remove the scratch files of `place` that no process is writing."""
    for path in place.parent.glob(f".{glob.escape(place.name)}.{MARK}-*.tmp"):
        with contextlib.suppress(OSError):  # another process writes it, or has just removed it
            if sys.platform == "win32":
                path.unlink()
                continue
            with path.open("rb") as file:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
