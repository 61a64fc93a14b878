"""Puts a bundle in its place: as a whole, by one command at a time, and only over what is a bundle already."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from medusa_runtime.bundle import TOLERATED, walk
from medusa_runtime.errors import BundleError
from medusa_runtime.manifest import FILE_NAME

from medusa_exporter.exchange import exchange
from medusa_exporter.site import CANNOT_MOVE, Site, bring_in, is_empty, is_mount, listed

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
        parts = [listed(folder / FILE_NAME) for folder in (bundle, Site(bundle.resolve(), within=True).ready)]
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
def claimed(bundle: Path, report: Report = lambda _line: None) -> Iterator[Site]:
    """Keep all other commands from `bundle` until the block ends; a second one waits.

    Before the block begins, what killed commands left is removed or finished, and it is tried whether the bundle can be
    replaced as a whole; if not, the work is done inside of its folder. Raises BundleError for a place that cannot hold
    a bundle.
    """
    check_target(bundle)
    place = bundle.resolve()
    site = Site(place, within=is_mount(place))
    with contextlib.ExitStack() as held:
        held.enter_context(_locked(site, bundle, report))
        _sweep(site)
        if not site.within and (os.path.lexists(site.inside.workshop) or not _is_movable(site)):
            held.enter_context(_locked(site.inside, bundle, report))
            _sweep(site.inside)
            if not _is_movable(site):
                site = site.inside
        if site.within:
            _is_movable(site)
        check_target(bundle)  # once more: another command may have worked on it until now
        yield site


@contextlib.contextmanager
def _locked(site: Site, bundle: Path, report: Report) -> Iterator[None]:
    """Hold the lock of `site`, and leave nothing unfinished when the block ends. Raises BundleError."""
    from filelock import FileLock, Timeout

    try:
        site.lock.parent.mkdir(parents=True, exist_ok=True)
        site.lock.touch()  # or say why not; a lock would be waited for
        lock = FileLock(site.lock)
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
        _clear(site)
        with contextlib.suppress(OSError):  # while it is held, so that nobody else's is removed
            site.lock.unlink()
        lock.release()
        if site.within:
            with contextlib.suppress(OSError):  # a hub's tool keeps something there too
                site.lock.parent.rmdir()


@contextlib.contextmanager
def appearing(site: Site) -> Iterator[Path]:
    """Give an empty folder that takes the bundle's place when the block ends well, and vanishes otherwise.

    What may lie in a bundle's folder without being part of it (a README, what a hub's tool has put there) stays.
    """
    _clear(site)
    site.new.mkdir(parents=True)
    try:
        yield site.new
        if site.within:
            site.new.rename(site.ready)  # from here on the next command finishes it
            bring_in(site)
        elif site.place.is_dir():
            for name in TOLERATED:
                if os.path.lexists(site.place / name) and not os.path.lexists(site.new / name):
                    link_or_copy(site.place / name, site.new / name)
            exchange(site.new, site.place, site.old)
        else:
            site.new.rename(site.place)
    except BaseException:
        with contextlib.suppress(OSError):
            bring_in(site)
        if site.old.exists() and not site.place.exists():
            site.old.rename(site.place)
        raise
    finally:
        _clear(site)


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


def _sweep(site: Site) -> None:
    """Remove what killed commands have left; a bundle that one of them had moved away comes back.

    A bundle whose files were being moved to their places comes there whole.
    """
    if not site.workshop.is_dir():
        return
    ours = {site.new.name, site.old.name, site.ready.name}
    if foreign := sorted({path.name for path in site.workshop.iterdir()} - ours):
        raise BundleError(
            f"{site.workshop} is where an unfinished bundle stands, but it holds {foreign[0]!r}; move that away"
        )
    if site.old.exists() and not site.place.exists():
        site.old.rename(site.place)
    try:
        bring_in(site)
    except OSError as error:
        raise BundleError(
            f"the bundle that a killed command left in {site.ready} cannot be moved to its place: {error}; make that "
            "possible, or remove the folder"
        ) from None
    _clear(site)


def _clear(site: Site) -> None:
    for folder in (site.new, site.old):
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # there is none, or it holds something else
        site.workshop.rmdir()


def _is_movable(site: Site) -> bool:
    """Write a file, and ask to rename the bundle onto a folder that is not empty.

    No system does that, but one that cannot rename the bundle at all (it is a mount point, or belongs to somebody
    else) says so first. Returns False for a folder that only its files can be replaced in. Raises BundleError.
    """
    try:
        site.new.mkdir(parents=True)
        (site.new / "probe").write_bytes(b"probe")
        if site.place.is_dir() and not site.within:
            site.place.rename(site.new)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return True
        if error.errno in CANNOT_MOVE:
            return False
        raise BundleError(
            f"no bundle can be put at {site.place}: {error.strerror or error}; give another place or make room"
        ) from None
    finally:
        _clear(site)
    return True
