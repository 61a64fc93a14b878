"""Puts a bundle in its place: as a whole, by one command at a time, and only over what is a bundle already."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from medusa_runtime.bundle import TOLERATED, walk
from medusa_runtime.errors import BundleError
from medusa_runtime.manifest import FILE_NAME, MAX_BYTES

from medusa_exporter.exchange import exchange

Report = Callable[[str], None]
MARK = "medusa-export"  # part of the names of all that stands next to a bundle while a command works on it
_OPENING = b'{\n  "digest": "'  # how every manifest begins


@dataclass(frozen=True)
class Site:
    """The place of a bundle and what stands next to it while one command works on it.

    `place` is the bundle's own folder, links resolved. `new` is the folder that is to take its place, `old` the bundle
    that was there. Both lie in `workshop`, on the same file system as the bundle.
    """

    place: Path

    @property
    def workshop(self) -> Path:
        """The folder for all that is unfinished; no other program has a reason to make one of this name."""
        return self.place.with_name(f".{self.place.name}.{MARK}")

    @property
    def new(self) -> Path:
        """The folder that is to take the bundle's place."""
        return self.workshop / "new"

    @property
    def old(self) -> Path:
        """The bundle that was replaced, until it is removed."""
        return self.workshop / "old"

    @property
    def lock(self) -> Path:
        """The file that the command that works on the bundle holds locked."""
        return self.place.with_name(f".{self.place.name}.{MARK}.lock")

    @property
    def at_rest(self) -> bool:
        """Whether nothing of a command that works on the bundle, or was killed, stands next to it."""
        return not os.path.lexists(self.workshop) and not os.path.lexists(self.lock)


def check_target(bundle: Path) -> None:
    """Refuse to build over anything but a bundle or an empty folder: nothing of the user's is ever removed.

    Raises BundleError for a file, for a folder that holds other things, and for a bundle to which files were added.
    """
    try:
        if not bundle.is_dir():
            if bundle.exists():
                raise BundleError(f"{bundle} is a file; give the folder that is to hold the bundle")
            return
        found = set(walk(bundle.resolve()))
        if not found and not any(bundle.iterdir()):
            return
        listed = _listed(bundle / FILE_NAME)
    except OSError as error:
        raise BundleError(f"{bundle} cannot be looked into: {error}; give another place for the bundle") from None
    if listed is None:
        raise BundleError(f"{bundle} is a folder with other things in it, not a bundle; give another place or empty it")
    if foreign := sorted(found - listed - {FILE_NAME}):
        raise BundleError(
            f"{bundle} holds {foreign[0]!r}, which is not part of the bundle there and would be lost; move it away, or "
            "give another place"
        )


def _listed(manifest: Path) -> set[str] | None:
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


@contextlib.contextmanager
def claimed(bundle: Path, report: Report = lambda _line: None) -> Iterator[Site]:
    """Keep all other commands from `bundle` until the block ends; a second one waits.

    Before the block begins, what killed commands left next to the bundle is removed, and it is tried whether the
    bundle can be replaced. Raises BundleError for a place that cannot hold a bundle.
    """
    from filelock import FileLock, Timeout

    check_target(bundle)
    site = Site(bundle.resolve())
    try:
        site.place.parent.mkdir(parents=True, exist_ok=True)
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
        _sweep(site)
        check_target(bundle)  # once more: another command may have worked on it until now
        _check_movable(site)
        yield site
    finally:
        _clear(site)
        with contextlib.suppress(OSError):  # while it is held, so that nobody else's is removed
            site.lock.unlink()
        lock.release()


@contextlib.contextmanager
def appearing(site: Site) -> Iterator[Path]:
    """Give an empty folder that takes the bundle's place when the block ends well, and vanishes otherwise.

    What may lie in a bundle's folder without being part of it (a README, what a hub's tool has put there) stays.
    """
    _clear(site)
    site.new.mkdir(parents=True)
    try:
        yield site.new
        if site.place.is_dir():
            for name in TOLERATED:
                if os.path.lexists(site.place / name) and not os.path.lexists(site.new / name):
                    link_or_copy(site.place / name, site.new / name)
            exchange(site.new, site.place, site.old)
        else:
            site.new.rename(site.place)
    except BaseException:
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
    """Remove what killed commands have left; a bundle that one of them had moved away comes back."""
    if not site.workshop.is_dir():
        return
    if foreign := sorted({path.name for path in site.workshop.iterdir()} - {site.new.name, site.old.name}):
        raise BundleError(
            f"{site.workshop} is where an unfinished bundle stands, but it holds {foreign[0]!r}; move that away"
        )
    if site.old.exists() and not site.place.exists():
        site.old.rename(site.place)
    _clear(site)


def _clear(site: Site) -> None:
    for folder in (site.new, site.old):
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # there is none, or it holds something else
        site.workshop.rmdir()


def _check_movable(site: Site) -> None:
    """Write a file, and ask to rename the bundle onto a folder that is not empty.

    No system does that, but one that cannot rename the bundle at all (it is a mount point, or belongs to somebody
    else) says so first.
    """
    try:
        site.new.mkdir(parents=True)
        (site.new / "probe").write_bytes(b"probe")
        if site.place.is_dir():
            site.place.rename(site.new)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return
        if error.errno == errno.EBUSY:
            raise BundleError(
                f"{site.place} is a mount point; expected a folder that can be replaced as a whole: give one inside "
                f"it, such as {site.place / 'bundle'}"
            ) from None
        raise BundleError(
            f"no bundle can be put at {site.place}: {error.strerror or error}; give another place or make room"
        ) from None
    finally:
        _clear(site)
