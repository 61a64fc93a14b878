"""What an output may replace: nothing, an empty file or folder, or what the same command wrote before.

Every command asks before it begins to work, so that a refusal comes at once. A file is recognised by what is in it,
never by its name. What each command writes is listed in `outputs`.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_runtime.errors import MedusaError

from medusa_exporter.files import check_can_create
from medusa_exporter.staging import MARK, Staging, finish_move

MADE_BY = "made_by"  # the first key of every JSON
LARGEST_JSON = 256 << 20  # bytes that are read to recognise one
REMEDY = "give another place, or remove it yourself"


class OverwriteError(MedusaError):
    """An output would replace what its command did not write, or its place can hold none. Nothing has been changed."""


@dataclass(frozen=True)
class Kind:
    """Something that a command writes. maker: the command. is_ours: whether a file, which is not empty, is of it.

    `is_ours` may raise OSError or ValueError for a file that is damaged or something else.
    """

    maker: str
    is_ours: Callable[[Path], bool]


@dataclass(frozen=True)
class JsonKind:
    """A JSON file that a command writes. keys: those by which files without MADE_BY, of earlier versions, are known."""

    maker: str
    keys: frozenset[str]

    def marked(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is to be written for `content`."""
        return {MADE_BY: self.maker, **content}

    def is_ours(self, file: Path) -> bool:
        """Whether the file names this maker, or has the keys. Raises OSError, ValueError."""
        if file.stat().st_size > LARGEST_JSON:
            return False
        try:
            content = json.loads(file.read_bytes())
        except RecursionError:
            return False
        if not isinstance(content, dict):
            return False
        return content[MADE_BY] == self.maker if MADE_BY in content else self.keys <= content.keys()


@dataclass(frozen=True)
class FolderKind:
    """A folder that a command makes, fills and removes."""

    maker: str
    is_ours: Callable[[Path], bool]


AnyKind = Kind | JsonKind | FolderKind


def starts_with(*texts: bytes) -> Callable[[Path], bool]:
    """Make a test for files that hold all of `texts` within their first 4096 bytes."""

    def test(path: Path) -> bool:
        with path.open("rb") as file:
            start = file.read(4096)
        return all(text in start for text in texts)

    return test


def check_output_file(
    file: Path, kind: Kind | JsonKind, *, inputs: Iterable[Path] = (), bundle: Path | None = None
) -> None:
    """Refuse an output file that would replace anything but what its command wrote.

    inputs: files that the command reads. bundle: a bundle's folder, which must hold no other files. A link is followed:
    what it leads to is replaced, and made where it leads to nothing. Raises OverwriteError.
    """
    place = Path(os.path.realpath(file))
    if bundle is not None and place.is_relative_to(bundle.resolve()):
        raise OverwriteError(f"{file} lies in the bundle, which must hold no other files; give another place")
    if any(place == Path(os.path.realpath(source)) for source in inputs):
        raise OverwriteError(f"{file} is one of the files to read; give another place")
    _check_content(file, place, kind)
    _check_writable(file, place)


def check_output_folder(folder: Path, kinds: Mapping[str, AnyKind], *, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output folder in which a file would be replaced that its command did not write.

    kinds: what is written into the folder, by name; its other files are left as they are. inputs: files and folders
    that the command reads; the folder may not be one of them or lie in one. Raises OverwriteError.
    """
    place = Path(os.path.realpath(folder))
    for source in (Path(os.path.realpath(source)) for source in inputs):
        if place == source:
            raise OverwriteError(f"{folder} is read by this command; give another folder to write to")
        if place.is_relative_to(source):
            raise OverwriteError(f"{folder} lies in {source}, which is read by this command; give another folder")
    if (status := _status(folder, place)) is not None and not stat.S_ISDIR(status.st_mode):
        raise OverwriteError(f"{folder} is a file; expected a folder to write to: {REMEDY}")
    staging = Staging(place, inside=True)
    if foreign := staging.foreign():
        raise OverwriteError(f"{staging.folder} is for unfinished files, but it holds {foreign[0]!r}; move that away")
    for parent in (staging.folder.parent, staging.folder):
        if os.path.lexists(parent) and not parent.is_dir():
            raise OverwriteError(f"{parent} is a file, expected a folder for unfinished files there; move it away")
    for name, kind in kinds.items():
        if (staging.ready / name).exists():  # a killed command has left it to be moved to its place
            _check_content(folder / name, place / name, kind)
    try:
        finish_move(staging)
    except OSError as error:
        raise OverwriteError(f"{staging.ready} has files of a killed command that cannot be moved: {error}") from None
    for name, kind in kinds.items():
        _check_content(folder / name, place / name, kind)
    _check_writable(folder / "x", place / "x")


def holds_only(*names: str) -> Callable[[Path], bool]:
    """Make a test for folders that hold files of these patterns only (those of unfinished ones included)."""

    def test(folder: Path) -> bool:
        return folder.is_dir() and all(
            any(path.match(name) for name in (*names, f".*.{MARK}-*.tmp", ".*.tmp")) and not path.is_dir()
            for path in folder.iterdir()
        )

    return test


def _status(path: Path, place: Path) -> os.stat_result | None:
    """Return what lies at `place`, None for nothing. Raises OverwriteError where nothing can lie there."""
    try:
        return place.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OverwriteError(f"{path} cannot be written: {error.strerror or error}; give another place") from None


def _check_content(path: Path, place: Path, kind: AnyKind) -> None:
    status = _status(path, place)
    if status is None:
        return
    if isinstance(kind, FolderKind):
        found = None if stat.S_ISDIR(status.st_mode) else "a file"
    elif stat.S_ISDIR(status.st_mode):
        found = "a folder"
    elif not stat.S_ISREG(status.st_mode):
        found = "neither a file nor a folder"
    elif not status.st_size:
        return
    else:
        found = None
    if found:
        wanted = "a folder" if isinstance(kind, FolderKind) else "the file"
        raise OverwriteError(f"{path} is {found}; expected {wanted} that {kind.maker} is to write: {REMEDY}")
    try:
        ours = kind.is_ours(place)
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise OverwriteError(
            f"{path} is there already, and is nothing that {kind.maker} wrote ({_described(place)}); it would be lost: "
            f"{REMEDY}"
        )


def _described(place: Path) -> str:
    try:
        if place.is_dir():
            names = sorted(path.name for path in place.iterdir())
            return f"a folder with {names[0]!r} in it" if names else "an empty folder"
        with place.open("rb") as file:
            start = file.read(32)
        return f"{place.stat().st_size} bytes that begin with {start!r}"
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"


def _check_writable(path: Path, place: Path) -> None:
    """Try a file in the folder of `place`, or in the one where that is to be made. Raises OverwriteError."""
    folder = place.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        check_can_create(folder / place.name)
    except OSError as error:
        why = "a part of it is a file" if error.errno == errno.ENOTDIR else error.strerror or error
        raise OverwriteError(f"{path} cannot be written: {why}; give another place") from None
