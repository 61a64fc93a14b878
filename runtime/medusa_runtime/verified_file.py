"""Reads and maps files of a bundle, and guarantees that the bytes are those that the manifest lists.

Small files are hashed each time they are read. Weights are hashed when the bundle is opened, or while they are loaded;
a file whose metadata (its stamp) has changed since then is hashed again.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.errors import BundleError
from medusa_runtime.facts import FileFacts

_BLOCK = 4 << 20  # bytes read and hashed at a time
_SETTLED = 2_000_000_000  # ns; file times may be this coarse, so a more recent stamp cannot exclude a later write


class FileStamp(NamedTuple):
    """File system metadata that changes when a file is written or replaced."""

    device: int
    inode: int
    size: int
    modified: int  # ns
    changed: int  # ns; Windows: created

    @classmethod
    def of(cls, file: Any) -> FileStamp:
        """Return the stamp of an open file."""
        status = os.fstat(file.fileno())
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def hash_file(path: Path) -> tuple[str, FileStamp | None]:
    """Return a file's SHA-256 and its stamp; the stamp is None if the file was written within the last seconds."""
    with _open_regular(path, 0) as file:
        started, before = time.time_ns(), FileStamp.of(file)
        digest = _sha256(file)
        settled = before == FileStamp.of(file) and _is_settled(before, started)
    return digest, before if settled else None


def is_stamped(path: Path, stamp: FileStamp | None) -> bool:
    """Return whether a file still has a stamp; False without one."""
    if stamp is None:
        return False
    with _open_regular(path, 0) as file:
        return FileStamp.of(file) == stamp


def _is_settled(stamp: FileStamp, now: int) -> bool:
    """Return whether a file was last written long enough before `now`, in ns, that a later write changes its stamp."""
    return max(stamp.modified, stamp.changed) < now - _SETTLED


@dataclass(frozen=True)
class VerifiedFile:
    """A file that is verified when it is read.

    Attributes:
        path: Path of the file.
        facts: Size and digest that it must have; None for a file without a manifest, which is not verified.
        stamp: Its metadata when it was hashed; None if that does not exclude later changes.
        record: Receives such a stamp when the file has been hashed again.
    """

    path: Path
    facts: FileFacts | None = None
    stamp: FileStamp | None = None
    record: Callable[[FileStamp | None], None] = lambda _stamp: None

    @property
    def size(self) -> int:
        """Size in bytes; raises BundleError if it is not in `facts` and the file cannot be found."""
        if self.facts is not None:
            return self.facts.size
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise BundleError(f"{self.path} cannot be read: {error}; build the bundle again") from None

    def read(self, most: int) -> bytes:
        """Return the file's verified bytes; raise BundleError, without reading, if there are more than `most`."""
        if self.size > most:
            raise BundleError(f"{self.path} has {self.size} bytes, expected at most {most}; build the bundle again")
        try:
            with _open_regular(self.path) as file:
                data = file.read(self.size + 1)
        except (OSError, MemoryError) as error:
            raise BundleError(f"{self.path} cannot be read: {error!r}; copy the bundle again") from None
        if self.facts is not None:
            self._compare(hashlib.sha256(data).hexdigest())
        return data

    @contextmanager
    def mapped(self) -> Iterator[NDArray[np.uint8]]:
        """Map the file into memory as a read-only uint8 array (size,), and hash it meanwhile.

        What was made of the array may be used only after the context, which ends with an error for a damaged file. The
        array may be kept, but later writes to the file are then not detected.

        Raises:
            BundleError: The file's content is not the listed one, or it was written during the context.
        """
        try:
            with _open_regular(self.path, 0) as file:
                before = FileStamp.of(file)
                with self._hashed(file, before):
                    if before.size:
                        pages = mmap.mmap(file.fileno(), before.size, access=mmap.ACCESS_READ)
                        yield np.frombuffer(pages, np.uint8)
                        if hasattr(mmap, "MADV_DONTNEED"):
                            # frees the pages; a kept array reads them again from the file
                            pages.madvise(mmap.MADV_DONTNEED)
                    else:
                        yield np.empty(0, np.uint8)
                if self.facts is not None and FileStamp.of(file) != before:
                    raise BundleError(f"{self.path} was written while it was loaded; open the bundle again")
        except OSError as error:
            raise BundleError(f"{self.path} cannot be mapped: {error}; copy the bundle again") from None

    @contextmanager
    def _hashed(self, file: Any, before: FileStamp) -> Iterator[None]:
        """Hash an open file in another thread while the body runs, unless its stamp is known; raise if it differs.

        An error of the body that a damaged file has caused is replaced by that error.
        """
        if self.facts is None or before == self.stamp:
            yield
            return
        if before.size != self.facts.size:
            raise self._changed(f"{before.size} bytes", str(self.facts.size))
        started = time.time_ns()
        with ThreadPoolExecutor(1) as pool:
            digest = pool.submit(_sha256, file)
            try:
                yield
            except Exception:
                self._compare(digest.result())
                raise
            self._compare(digest.result())
        self.record(before if _is_settled(before, started) else None)

    def _compare(self, digest: str) -> None:
        if self.facts is not None and digest != self.facts.sha256:
            raise self._changed(f"SHA-256 {digest}", self.facts.sha256)

    def _changed(self, found: str, expected: str) -> BundleError:
        return BundleError(
            f"{self.path} has {found}, expected {expected}: it is damaged, or was changed after the bundle was opened; "
            "open the bundle again, or copy it again"
        )


def _open_regular(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file to be read. A pipe that has taken its place would otherwise be waited for, without end."""

    def without_waiting(name: str, flags: int) -> int:
        opened = os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
        if stat.S_ISREG(os.fstat(opened).st_mode):
            return opened
        os.close(opened)
        raise OSError(f"{path} is not a regular file")

    return open(path, "rb", buffering, opener=without_waiting)


def _sha256(file: Any) -> str:
    """Return the SHA-256 of a file from its current position."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    while count := file.readinto(block):
        digest.update(block[:count])
    return digest.hexdigest()
