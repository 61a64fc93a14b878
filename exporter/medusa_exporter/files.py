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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

if sys.platform != "win32":
    import fcntl

MARK = "medusa-export"  # part of the name of all that is unfinished; no other program has a reason to use it
_BLOCK = 4 << 20  # bytes read and hashed at a time
_NUMBERS = re.compile(r"\[\n[\s\d,-]+\]")  # of whole numbers, over several lines; no JSON text holds a line break


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a scratch file next to `path` that takes its place when the block ends, and is removed when it raises.

    The folder is made. Where `path` is a link, the file that it leads to is replaced and the link stays. Scratch files
    that killed processes have left are removed. Raises OSError.
    """
    place = Path(os.path.realpath(path))
    place.parent.mkdir(parents=True, exist_ok=True)
    _sweep(place)
    scratch = _scratch(place)
    try:
        with scratch.open("xb") as file:
            _lock(file)
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
def written_together(folder: Path) -> Iterator[Path]:
    """Give an empty folder whose files come into `folder` together when the block ends, or not at all when it raises.

    A process killed while they are moved leaves them to `finish`, which the next reader or writer calls. OSError.
    """
    finish(folder)
    new = folder / f".{MARK}" / "new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        for path in new.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        new.rename(new.with_name("ready"))
        finish(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        with contextlib.suppress(OSError):
            new.parent.rmdir()


def finish(folder: Path) -> None:
    """Move the files of a killed `written_together` to their places, where it was complete. Raises OSError."""
    ready = folder / f".{MARK}" / "ready"
    if not ready.is_dir():
        return
    for path in sorted(ready.iterdir()):
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
    with written_whole(path) as file:
        file.write(content)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def try_place(path: Path) -> None:
    """Make and remove a scratch file, so that a place where none can be written shows before hours of work: OSError."""
    scratch = _scratch(path)
    scratch.touch(exist_ok=False)
    scratch.unlink()


def _scratch(place: Path) -> Path:
    return place.with_name(f".{place.name}.{MARK}-{secrets.token_hex(4)}.tmp")


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
