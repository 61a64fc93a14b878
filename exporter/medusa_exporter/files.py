"""Files that appear whole: whoever reads one finds what lay there before, or all of the new."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from medusa_runtime.errors import BusyError

if sys.platform != "win32":
    import fcntl

LOCK = "lock"  # in the workshop of a folder that is being written
MARK = "medusa-export"  # part of the name of all that is unfinished; no other program has a reason to use it
WAIT = 600.0  # seconds for another writer of a folder to end, before one gives up
_VANISHED = 200  # times that a folder may be gone before it cannot be made at all
_BLOCK = 4 << 20  # bytes read and hashed at a time
_NUMBERS = re.compile(r"\[\n[\s\d,-]+\]")  # of whole numbers, over several lines; no JSON text holds a line break


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a scratch file next to `path` that takes its place when the block ends, and is removed when it raises.

    The folder is made. Where `path` is a link, the file that it leads to is replaced and the link stays. Scratch files
    that killed processes have left are removed. Raises OSError.
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
    """Give an empty folder whose files come into `folder` together when the block ends, or not at all when it raises.

    A process killed while they are moved leaves them to `finish_interrupted_write`, which the next reader or writer
    calls. A second writer of the folder waits for the first one. Raises OSError, and BusyError after WAIT seconds.
    """
    with _alone(folder):
        finish_interrupted_write(folder)
        new = folder / f".{MARK}" / "new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            yield new
            for path in new.iterdir():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
            new.rename(new.with_name("ready"))
            finish_interrupted_write(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, a file in its workshop; both go with the block. Raises BusyError, OSError."""
    from filelock import FileLock, Timeout

    workshop = folder / f".{MARK}"
    lock, until, vanished = FileLock(workshop / LOCK), time.monotonic() + WAIT, 0
    while True:
        try:
            workshop.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
            break
        except (FileExistsError, FileNotFoundError):  # its last holder was just removing the workshop
            vanished += 1
            if vanished > _VANISHED:
                raise
        except Timeout:
            if time.monotonic() > until:
                raise BusyError(
                    f"another command is writing to {folder}, for more than {WAIT:.0f} seconds; nothing was written: "
                    "wait until it has ended, then run this again, or give another folder"
                ) from None
        time.sleep(0.01)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (workshop / LOCK).unlink()  # while it is held, so that nobody else's is removed
        lock.release()
        with contextlib.suppress(OSError):
            workshop.rmdir()


def finish_interrupted_write(folder: Path) -> None:
    """Move the files of a killed `atomic_write_files` to their places, where it was complete. Raises OSError.

    Several may do so at once: what one of them has moved is gone for the others.
    """
    ready = folder / f".{MARK}" / "ready"
    if not ready.is_dir():
        return
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(ready.iterdir()):
            with contextlib.suppress(FileNotFoundError):
                path.replace(folder / path.name)
        ready.rmdir()
    with contextlib.suppress(OSError):
        ready.parent.rmdir()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path` as strict JSON, indented by 2, each list of whole numbers on one line.

    Raises ValueError or TypeError for what JSON cannot say.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    text = _NUMBERS.sub(lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text)
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`."""
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
    """Make and remove a scratch file, so that a place where none can be written shows before hours of work: OSError."""
    scratch = _scratch(path)
    scratch.touch(exist_ok=False)
    scratch.unlink()


def _scratch(place: Path) -> Path:
    return place.with_name(f".{place.name}.{MARK}-{secrets.token_hex(4)}.tmp")


def _opened(place: Path) -> tuple[Path, BinaryIO]:
    """Open and lock a new scratch file, which nobody has swept away before it was locked. Raises OSError."""
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
    """Lock a file until it is closed; Windows removes no file that is open."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):  # a file system without locks; then nobody removes what it cannot lock
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)


def _sweep(place: Path) -> None:
    """Remove the scratch files of `place` that no process is writing."""
    for path in place.parent.glob(f".{glob.escape(place.name)}.{MARK}-*.tmp"):
        with contextlib.suppress(OSError):  # somebody holds it, or has just removed it
            if sys.platform == "win32":
                path.unlink()
                continue
            with path.open("rb") as file:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
