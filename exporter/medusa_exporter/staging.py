"""Staging folders: where a command writes files before all of them appear together in their target folder.

A bundle is staged next to its folder, which is then swapped as a whole. A folder that cannot be renamed, such as the
mount point of a container's volume, and a folder that may hold other files, as one of heads or data, has its staging
folder inside, below `.cache`, where readers do not look; finished files are then moved to their places one by one. A
command that is killed while it moves them leaves the rest to whoever uses the folder next, see `finish_move`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from medusa_runtime.bundle import walk
from medusa_runtime.manifest import FILE_NAME, MAX_BYTES

MARK = "medusa-export"  # part of the name of every unfinished file or folder; no other program has a reason to use it
CANNOT_MOVE = (errno.EBUSY, errno.EXDEV)  # a mount point; a folder of a lower layer of an overlay file system
_MANIFEST_START = b'{\n  "digest": "'  # how the manifest of every bundle begins


@dataclass(frozen=True)
class Staging:
    """Paths that a command uses while it writes to a target folder, all on one file system.

    Attributes:
        target: The folder that the finished files are for.
        inside: Whether the staging folder is inside of `target`, and not next to it.
    """

    target: Path
    inside: bool = False

    @property
    def folder(self) -> Path:
        """The staging folder, which contains the three below."""
        return self.target / ".cache" / MARK if self.inside else self.target.with_name(f".{self.target.name}.{MARK}")

    @property
    def new(self) -> Path:
        """Files that are being written."""
        return self.folder / "new"

    @property
    def ready(self) -> Path:
        """Finished files that are being moved to the target; used if the staging folder is inside of it."""
        return self.folder / "ready"

    @property
    def old(self) -> Path:
        """The bundle that was swapped for the new one, until it is removed."""
        return self.folder / "old"

    @property
    def lock(self) -> Path:
        """The lock file of the command that writes to the target."""
        return self.folder.with_name(f"{self.folder.name}.lock")

    def moved_inside(self) -> Staging:
        """Return the same target with its staging folder inside of it."""
        return replace(self, inside=True)

    @property
    def at_rest(self) -> bool:
        """Whether no command writes to the target, or was killed while it did."""
        return not any(os.path.lexists(path) for one in (self, self.moved_inside()) for path in (one.folder, one.lock))

    def foreign(self) -> list[str]:
        """Return the names in the staging folder that no command of ours has put there, sorted."""
        ours = {self.new.name, self.old.name, self.ready.name}
        return sorted({path.name for path in self.folder.iterdir()} - ours) if self.folder.is_dir() else []

    def clear(self) -> None:
        """Remove what is unfinished, and a bundle that was replaced; keep finished files."""
        for folder in (self.new, self.old):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # it does not exist, or holds something else
            self.folder.rmdir()


@contextmanager
def staged_files(staging: Staging) -> Iterator[Path]:
    """Yield an empty folder whose files are moved to the target together when the block ends without an error.

    The caller holds the lock. `staging` is inside of its target.
    """
    staging.clear()
    staging.new.mkdir(parents=True)
    try:
        yield staging.new
        staging.new.rename(staging.ready)  # from here on, whoever comes next can finish the move
        finish_move(staging)
    except BaseException:
        with contextlib.suppress(OSError):
            finish_move(staging)
        raise
    finally:
        staging.clear()


def finish_move(staging: Staging) -> None:
    """Move finished files to the target; the command that wrote them may have been killed before it could.

    A bundle's manifest comes last, after the files that only the previous bundle has were removed: until then the
    bundle does not open. Only the holder of the lock may finish a bundle; readers of other files need no lock, since
    each process skips the files that another one has moved. Raises OSError.
    """
    if not staging.ready.is_dir():
        return
    target, ready = staging.target, staging.ready
    coming = listed_files(ready / FILE_NAME)
    names = set[str]()
    with contextlib.suppress(FileNotFoundError):  # another process has moved all of them
        names = {path.relative_to(ready).as_posix() for path in ready.rglob("*") if not path.is_dir()}
    for name in sorted(names if coming is None else names - {FILE_NAME}):
        _move(ready / name, target / name)
    if coming is not None:
        for name in sorted(set(walk(target)) & (listed_files(target / FILE_NAME) or set()) - coming):
            (target / name).unlink()
            _remove_empty_parents(target / name, target)
        _move(ready / FILE_NAME, target / FILE_NAME)
    with contextlib.suppress(OSError):  # another process has removed them
        for folder in sorted((path for path in ready.rglob("*") if path.is_dir()), reverse=True):
            folder.rmdir()
        ready.rmdir()
        ready.parent.rmdir()


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # another process has moved it
        source.replace(target)
        if source.samefile(target):  # hard links of one file, with which a rename does nothing
            source.unlink()


def _remove_empty_parents(path: Path, root: Path) -> None:
    folder = path.parent
    while folder != root and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def is_mount(folder: Path) -> bool:
    """Return whether a folder is a mount point, even one of the same file system.

    The system is asked to move the folder into itself. No system does that, but it reports different mounts first.
    """
    if os.path.ismount(folder):
        return True
    try:
        folder.rename(folder / MARK)
    except OSError as error:
        return error.errno in CANNOT_MOVE
    return False


def is_empty(folder: Path) -> bool:
    """Return whether a folder contains nothing but the staging folder of a bundle."""
    staging = Staging(folder.resolve(), inside=True)
    ours = (staging.folder.parent, staging.folder, staging.lock)
    return all(path in ours or path.is_relative_to(staging.folder) for path in staging.target.rglob("*"))


def enclosing_bundle(place: Path) -> Path | None:
    """Return the folder of the bundle that `place` is in, or would be in; None if there is none."""
    for folder in place.parents:
        with contextlib.suppress(OSError):
            if listed_files(folder / FILE_NAME) is not None:
                return folder
    return None


def listed_files(manifest: Path) -> set[str] | None:
    """Return the files that a bundle's manifest of any version lists; None if this is not the manifest of a bundle."""
    if not manifest.is_file():
        return None
    with manifest.open("rb") as file:
        data = file.read(MAX_BYTES)
    if not data.startswith(_MANIFEST_START):
        return None
    try:
        files = json.loads(data)["files"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return set(files) if isinstance(files, dict) else None
