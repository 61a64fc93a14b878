"""Where a command that works on a bundle keeps what is unfinished, and how that becomes the bundle.

Usually all of it stands next to the bundle, whose folder is then swapped as a whole. A folder that cannot be renamed,
as a mount point of a container's volume, keeps it inside, below `.cache`, where readers of a bundle do not look.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from medusa_runtime.bundle import walk
from medusa_runtime.manifest import FILE_NAME, MAX_BYTES

MARK = "medusa-export"  # part of the names of all that a command keeps while it works on a bundle
CANNOT_MOVE = (errno.EBUSY, errno.EXDEV)  # a mount point; a folder of a lower layer of an overlay file system
_OPENING = b'{\n  "digest": "'  # how every manifest begins


@dataclass(frozen=True)
class Staging:
    """The place of a bundle and what one command keeps while it works on it, all on one file system.

    `place` is the bundle's own folder, links resolved. `new` is the folder that is to take its place, `old` the bundle
    that was there. within: whether they stand inside of `place`, which cannot be renamed; then `new` becomes `ready`,
    the files of which are moved to the place one by one.
    """

    place: Path
    within: bool = False

    @property
    def workshop(self) -> Path:
        """The folder for all that is unfinished; no other program has a reason to make one of this name."""
        return self.place / ".cache" / MARK if self.within else self.place.with_name(f".{self.place.name}.{MARK}")

    @property
    def new(self) -> Path:
        """The folder that is to take the bundle's place."""
        return self.workshop / "new"

    @property
    def old(self) -> Path:
        """The bundle that was replaced, until it is removed."""
        return self.workshop / "old"

    @property
    def ready(self) -> Path:
        """The finished bundle whose files are being moved to the place."""
        return self.workshop / "ready"

    @property
    def lock(self) -> Path:
        """The file that the command that works on the bundle holds locked."""
        return self.workshop.with_name(f"{self.workshop.name}.lock")

    @property
    def inside(self) -> Staging:
        """The same place, with all that is unfinished inside of it."""
        return replace(self, within=True)

    @property
    def at_rest(self) -> bool:
        """Whether nothing is left of a command that works on the bundle, or was killed."""
        return not any(os.path.lexists(path) for one in (self, self.inside) for path in (one.workshop, one.lock))


def is_mount(folder: Path) -> bool:
    """Whether a folder is a mount point, one of the same file system included.

    It is asked to move into itself, which no system does; but that the two lie on different mounts is said first.
    """
    if os.path.ismount(folder):
        return True
    try:
        folder.rename(folder / MARK)
    except OSError as error:
        return error.errno in CANNOT_MOVE
    return False


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what a command keeps that works on a bundle there."""
    staging = Staging(folder.resolve(), within=True)
    ours = (staging.workshop.parent, staging.workshop, staging.lock)
    return all(path in ours or path.is_relative_to(staging.workshop) for path in staging.place.rglob("*"))


def listed(manifest: Path) -> set[str] | None:
    """Return the files that a manifest of any version lists; None where there is no manifest of a bundle."""
    if not manifest.is_file():
        return None
    with manifest.open("rb") as file:
        data = file.read(MAX_BYTES)
    if not data.startswith(_OPENING):
        return None
    try:
        files = json.loads(data)["files"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return set(files) if isinstance(files, dict) else None


def bring_in(staging: Staging) -> None:
    """Move the files of `ready` to the place, and remove those of the bundle before; the manifest comes last.

    Until then the bundle does not open. What ends the move early is made up for by calling this once more.
    """
    if not staging.ready.is_dir():
        return
    if (coming := listed(staging.ready / FILE_NAME)) is not None:
        for name in sorted(set(walk(staging.ready)) - {FILE_NAME}):
            (staging.place / name).parent.mkdir(parents=True, exist_ok=True)
            (staging.ready / name).replace(staging.place / name)
        for name in sorted(set(walk(staging.place)) & (listed(staging.place / FILE_NAME) or set()) - coming):
            (staging.place / name).unlink()
            _remove_empty((staging.place / name).parent, staging.place)
        (staging.ready / FILE_NAME).replace(staging.place / FILE_NAME)
    shutil.rmtree(staging.ready)


def _remove_empty(folder: Path, root: Path) -> None:
    while folder != root and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
