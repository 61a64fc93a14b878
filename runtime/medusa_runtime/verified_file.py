"""Files of a bundle as they were checked: what is read or mapped is what was hashed.

Small files are hashed each time they are read. Weights are hashed when the bundle is opened; the file system's own
record of the file (its stamp) then tells whether it has been written since, and if so it is hashed again.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.errors import BundleError
from medusa_runtime.facts import FileFacts

_BLOCK = 4 << 20  # bytes read and hashed at a time
_SETTLED = 2_000_000_000  # ns: a file system's clock may be this coarse, so a younger stamp may hide a later write


class FileStamp(NamedTuple):
    """What a file system records of a file; every write changes it, and so does another file in its place."""

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
    """Return a file's SHA-256 and its stamp; None for the stamp of a file that was written moments before."""
    with path.open("rb", buffering=0) as file:
        started, before = time.time_ns(), FileStamp.of(file)
        digest = _sha256(file)
        settled = before == FileStamp.of(file) and max(before.modified, before.changed) < started - _SETTLED
    return digest, before if settled else None


@dataclass(frozen=True)
class VerifiedFile:
    """One file. facts: its size and digest, None for a file that no manifest vouches for. stamp: when hashed."""

    path: Path
    facts: FileFacts | None = None
    stamp: FileStamp | None = None

    @property
    def size(self) -> int:
        """Bytes. Raises BundleError for an unlisted file that cannot be found."""
        if self.facts is not None:
            return self.facts.size
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise BundleError(f"{self.path} cannot be read: {error}; build the bundle again") from None

    def read(self, most: int) -> bytes:
        """Return the file's bytes, hashed as they were read. Raises BundleError for more than `most` bytes, unread."""
        if self.size > most:
            raise BundleError(f"{self.path} has {self.size} bytes, expected at most {most}; build the bundle again")
        try:
            with self.path.open("rb") as file:
                data = file.read(self.size + 1)
        except (OSError, MemoryError) as error:
            raise BundleError(f"{self.path} cannot be read: {error!r}; copy the bundle again") from None
        if self.facts is not None and hashlib.sha256(data).hexdigest() != self.facts.sha256:
            raise self._changed()
        return data

    @contextmanager
    def mapped(self) -> Iterator[NDArray[np.uint8]]:
        """Map the file, (size,) uint8, read-only. Raises BundleError unless it holds what was hashed, until the end.

        The array may be kept; whether the file is written after the end of the context is nobody's concern then.
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                before = FileStamp.of(file)
                if self.facts is not None:
                    trusted = before.size == self.facts.size and before == self.stamp
                    if not trusted and _sha256(file) != self.facts.sha256:
                        raise self._changed()
                if before.size:
                    pages = mmap.mmap(file.fileno(), before.size, access=mmap.ACCESS_READ)
                    yield np.frombuffer(pages, np.uint8)
                    if hasattr(mmap, "MADV_DONTNEED"):
                        pages.madvise(mmap.MADV_DONTNEED)  # who keeps the array keeps no memory
                else:
                    yield np.empty(0, np.uint8)
                if self.facts is not None and FileStamp.of(file) != before:
                    raise BundleError(f"{self.path} was written while it was loaded; open the bundle again")
        except OSError as error:
            raise BundleError(f"{self.path} cannot be mapped: {error}; copy the bundle again") from None

    def _changed(self) -> BundleError:
        return BundleError(f"{self.path} changed after the bundle was opened; open it again")


def _sha256(file: Any) -> str:
    """Hash a file from where it stands."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    while count := file.readinto(block):
        digest.update(block[:count])
    return digest.hexdigest()
