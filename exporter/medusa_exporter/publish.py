"""Puts a bundle in its place: as a whole, by one command at a time, and never over anything but another bundle."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from medusa_runtime.bundle import IGNORED_NAMES, walk
from medusa_runtime.errors import BundleError
from medusa_runtime.manifest import FILE_NAME

from medusa_exporter.folder_lock import hold_lock
from medusa_exporter.folder_swap import swap_folders
from medusa_exporter.staging import (
    CANNOT_MOVE,
    Staging,
    enclosing_bundle,
    finish_move,
    is_empty,
    is_mount,
    listed_files,
    staged_files,
)

Report = Callable[[str], None]


def check_target(bundle: Path) -> None:
    """Refuse to build over anything but a bundle or an empty folder, so that no file of the user is ever removed.

    Raises:
        BundleError: For a file, for a folder with other files in it, for a bundle to which files were added, and for a
            folder inside of another bundle.
    """
    if other := enclosing_bundle(bundle.resolve()):
        raise BundleError(
            f"{bundle} is inside of the bundle {other}, which must hold no other files; give another place"
        )
    try:
        if not bundle.is_dir():
            if bundle.exists():
                raise BundleError(f"{bundle} is a file; give the folder that is to hold the bundle")
            return
        if is_empty(bundle):
            return
        found = set(walk(bundle.resolve()))
        finished = Staging(bundle.resolve(), inside=True).ready
        listed = [listed_files(folder / FILE_NAME) for folder in (bundle, finished)]
    except OSError as error:
        raise BundleError(f"{bundle} cannot be read: {error}; give another place for the bundle") from None
    if listed == [None, None]:
        raise BundleError(f"{bundle} is a folder with other things in it, not a bundle; give another place or empty it")
    if foreign := sorted(found.difference({FILE_NAME}, *filter(None, listed))):
        raise BundleError(
            f"{bundle} holds {foreign[0]!r}, which is not part of the bundle there and would be lost; move it away, or "
            "give another place"
        )


@contextlib.contextmanager
def lock_bundle(bundle: Path, report: Report = lambda _line: None) -> Iterator[Staging]:
    """Keep all other commands from changing `bundle` until the block ends; they wait.

    Before the block begins, what killed commands left is removed or finished, and it is tried whether the bundle's
    folder can be renamed; if not, the bundle is staged inside of it.

    Args:
        bundle: The bundle's folder, which need not exist.
        report: Called with a line if another command holds the lock.

    Yields:
        The staging folder to write the next version of the bundle to, see `replace_bundle`.

    Raises:
        BundleError: For a place that cannot hold a bundle.
    """
    check_target(bundle)
    target = bundle.resolve()
    staging = Staging(target, inside=is_mount(target))
    with contextlib.ExitStack() as locks:
        locks.enter_context(_locked(staging, bundle, report))
        _recover(staging)
        if not staging.inside and (os.path.lexists(staging.moved_inside().folder) or not _can_replace(staging)):
            locks.enter_context(_locked(staging.moved_inside(), bundle, report))
            _recover(staging.moved_inside())
            if not _can_replace(staging):
                staging = staging.moved_inside()
        if staging.inside:
            _can_replace(staging)
        check_target(bundle)  # once more: another command may have worked on it until now
        yield staging


@contextlib.contextmanager
def _locked(staging: Staging, bundle: Path, report: Report) -> Iterator[None]:
    """Hold the lock of `staging`, and leave nothing unfinished when the block ends. Raises BundleError."""

    def on_wait() -> None:
        report(f"another command works on {bundle}; wait until it has ended")

    with contextlib.ExitStack() as lock:
        try:  # a hub's tool keeps something in `.cache` too: the folder is removed if it is empty
            lock.enter_context(hold_lock(staging.lock, remove_folder=staging.inside, on_wait=on_wait))
        except OSError as error:
            raise BundleError(f"no bundle can be put at {bundle}: {error}; give another place") from None
        try:
            yield
        finally:
            staging.clear()


@contextlib.contextmanager
def replace_bundle(staging: Staging) -> Iterator[Path]:
    """Yield an empty folder that replaces the bundle when the block ends, and is removed if it raises.

    Files that a bundle's folder may contain without being part of it (a README, a hub tool's cache) are kept.
    """
    if staging.inside:
        with staged_files(staging) as folder:
            yield folder
        return
    staging.clear()
    staging.new.mkdir(parents=True)
    try:
        yield staging.new
        if staging.target.is_dir():
            for name in IGNORED_NAMES:
                if os.path.lexists(staging.target / name) and not os.path.lexists(staging.new / name):
                    link_or_copy(staging.target / name, staging.new / name)
            swap_folders(staging.new, staging.target, staging.old)
        else:
            staging.new.rename(staging.target)
    except BaseException:
        if staging.old.exists() and not staging.target.exists():
            staging.old.rename(staging.target)
        raise
    finally:
        staging.clear()


def link_or_copy(source: Path, target: Path) -> None:
    """Make a file or folder available at `target` too: by hard links where the file system has them, else by copies."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link_file)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        _link_file(source, target)


def _link_file(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _recover(staging: Staging) -> None:
    """Remove or finish what killed commands have left, and put a bundle back that one of them had moved away."""
    if foreign := staging.foreign():
        raise BundleError(
            f"{staging.folder} is the folder for unfinished bundles, but it holds {foreign[0]!r}; move that away"
        )
    if staging.old.exists() and not staging.target.exists():
        staging.old.rename(staging.target)
    try:
        finish_move(staging)
    except OSError as error:
        raise BundleError(
            f"the bundle that a killed command left in {staging.ready} cannot be moved to its place: {error}; make "
            "that possible, or remove the folder"
        ) from None
    staging.clear()


def _can_replace(staging: Staging) -> bool:
    """Try to write a file, and ask the system to rename the bundle onto a folder that is not empty.

    No system does the latter, but one that cannot rename the bundle at all (it is a mount point, or belongs to another
    user) reports that first.

    Returns:
        False for a folder that cannot be renamed, so that only its files can be replaced.

    Raises:
        BundleError: If nothing can be written.
    """
    try:
        staging.new.mkdir(parents=True)
        (staging.new / "probe").write_bytes(b"probe")
        if staging.target.is_dir() and not staging.inside:
            staging.target.rename(staging.new)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return True
        if error.errno in CANNOT_MOVE:
            return False
        raise BundleError(
            f"no bundle can be put at {staging.target}: {error.strerror or error}; give another place or make room"
        ) from None
    finally:
        staging.clear()
    return True
