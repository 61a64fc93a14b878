"""Puts a bundle in its place: as a whole, by one command at a time, and only over what is a bundle already."""

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

from medusa_exporter.folder_swap import swap_folders
from medusa_exporter.staging import CANNOT_MOVE, Staging, bring_in, is_empty, is_mount, listed

Report = Callable[[str], None]


def check_target(bundle: Path) -> None:
    """Refuse to build over anything but a bundle or an empty folder: nothing of the user's is ever removed.

    Raises BundleError for a file, for a folder that holds other things, and for a bundle to which files were added.
    """
    try:
        if not bundle.is_dir():
            if bundle.exists():
                raise BundleError(f"{bundle} is a file; give the folder that is to hold the bundle")
            return
        if is_empty(bundle):
            return
        found = set(walk(bundle.resolve()))
        parts = [listed(folder / FILE_NAME) for folder in (bundle, Staging(bundle.resolve(), within=True).ready)]
    except OSError as error:
        raise BundleError(f"{bundle} cannot be looked into: {error}; give another place for the bundle") from None
    if parts == [None, None]:
        raise BundleError(f"{bundle} is a folder with other things in it, not a bundle; give another place or empty it")
    if foreign := sorted(found.difference({FILE_NAME}, *filter(None, parts))):
        raise BundleError(
            f"{bundle} holds {foreign[0]!r}, which is not part of the bundle there and would be lost; move it away, or "
            "give another place"
        )


@contextlib.contextmanager
def lock_bundle(bundle: Path, report: Report = lambda _line: None) -> Iterator[Staging]:
    """Keep all other commands from `bundle` until the block ends; a second one waits.

    Before the block begins, what killed commands left is removed or finished, and it is tried whether the bundle can be
    replaced as a whole; if not, the work is done inside of its folder. Raises BundleError for a place that cannot hold
    a bundle.
    """
    check_target(bundle)
    place = bundle.resolve()
    staging = Staging(place, within=is_mount(place))
    with contextlib.ExitStack() as held:
        held.enter_context(_locked(staging, bundle, report))
        _sweep(staging)
        if not staging.within and (os.path.lexists(staging.inside.workshop) or not _is_movable(staging)):
            held.enter_context(_locked(staging.inside, bundle, report))
            _sweep(staging.inside)
            if not _is_movable(staging):
                staging = staging.inside
        if staging.within:
            _is_movable(staging)
        check_target(bundle)  # once more: another command may have worked on it until now
        yield staging


@contextlib.contextmanager
def _locked(staging: Staging, bundle: Path, report: Report) -> Iterator[None]:
    """Hold the lock of `staging`, and leave nothing unfinished when the block ends. Raises BundleError."""
    from filelock import FileLock, Timeout

    try:
        staging.lock.parent.mkdir(parents=True, exist_ok=True)
        staging.lock.touch()  # or say why not; a lock would be waited for
        lock = FileLock(staging.lock)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            report(f"another command works on {bundle}; wait until it has ended")
            lock.acquire()
    except OSError as error:
        raise BundleError(f"no bundle can be put at {bundle}: {error}; give another place") from None
    try:
        yield
    finally:
        _clear(staging)
        with contextlib.suppress(OSError):  # while it is held, so that nobody else's is removed
            staging.lock.unlink()
        lock.release()
        if staging.within:
            with contextlib.suppress(OSError):  # a hub's tool keeps something there too
                staging.lock.parent.rmdir()


@contextlib.contextmanager
def replace_bundle(staging: Staging) -> Iterator[Path]:
    """Give an empty folder that takes the bundle's place when the block ends well, and vanishes otherwise.

    What may lie in a bundle's folder without being part of it (a README, what a hub's tool has put there) stays.
    """
    _clear(staging)
    staging.new.mkdir(parents=True)
    try:
        yield staging.new
        if staging.within:
            staging.new.rename(staging.ready)  # from here on the next command finishes it
            bring_in(staging)
        elif staging.place.is_dir():
            for name in IGNORED_NAMES:
                if os.path.lexists(staging.place / name) and not os.path.lexists(staging.new / name):
                    link_or_copy(staging.place / name, staging.new / name)
            swap_folders(staging.new, staging.place, staging.old)
        else:
            staging.new.rename(staging.place)
    except BaseException:
        with contextlib.suppress(OSError):
            bring_in(staging)
        if staging.old.exists() and not staging.place.exists():
            staging.old.rename(staging.place)
        raise
    finally:
        _clear(staging)


def link_or_copy(source: Path, target: Path) -> None:
    """Put a file or folder at `target` as well: hard links of its files where the file system has them, or copies."""
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


def _sweep(staging: Staging) -> None:
    """Remove what killed commands have left; a bundle that one of them had moved away comes back.

    A bundle whose files were being moved to their places comes there whole.
    """
    if not staging.workshop.is_dir():
        return
    ours = {staging.new.name, staging.old.name, staging.ready.name}
    if foreign := sorted({path.name for path in staging.workshop.iterdir()} - ours):
        raise BundleError(
            f"{staging.workshop} is where an unfinished bundle stands, but it holds {foreign[0]!r}; move that away"
        )
    if staging.old.exists() and not staging.place.exists():
        staging.old.rename(staging.place)
    try:
        bring_in(staging)
    except OSError as error:
        raise BundleError(
            f"the bundle that a killed command left in {staging.ready} cannot be moved to its place: {error}; make "
            "that possible, or remove the folder"
        ) from None
    _clear(staging)


def _clear(staging: Staging) -> None:
    for folder in (staging.new, staging.old):
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # there is none, or it holds something else
        staging.workshop.rmdir()


def _is_movable(staging: Staging) -> bool:
    """Write a file, and ask to rename the bundle onto a folder that is not empty.

    No system does that, but one that cannot rename the bundle at all (it is a mount point, or belongs to somebody
    else) says so first. Returns False for a folder that only its files can be replaced in. Raises BundleError.
    """
    try:
        staging.new.mkdir(parents=True)
        (staging.new / "probe").write_bytes(b"probe")
        if staging.place.is_dir() and not staging.within:
            staging.place.rename(staging.new)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return True
        if error.errno in CANNOT_MOVE:
            return False
        raise BundleError(
            f"no bundle can be put at {staging.place}: {error.strerror or error}; give another place or make room"
        ) from None
    finally:
        _clear(staging)
    return True
