"""Checks that an output does not overwrite anything but an earlier output of the same command.

Every command checks its outputs before it begins to work. A file is recognised by its content, never by its name; the
kinds of files that each command writes are listed in `output_kinds`.
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
from medusa_exporter.staging import MARK, Staging, enclosing_bundle, finish_move

MADE_BY = "made_by"  # the first key of every JSON
MAX_JSON_BYTES = 256 << 20  # bytes; larger files are not read to recognise them
REMEDY = "give another place, or remove it yourself"


class OverwriteError(MedusaError):
    """An output would overwrite what its command did not write, or cannot be written. Nothing has been changed."""


@dataclass(frozen=True)
class Kind:
    """A file that a command writes.

    Attributes:
        maker: The command.
        is_ours: Returns whether a file, which is not empty, is of this kind. It may raise OSError or ValueError for a
            file that is damaged or of another kind.
    """

    maker: str
    is_ours: Callable[[Path], bool]


@dataclass(frozen=True)
class JsonKind:
    """A JSON file that a command writes.

    Attributes:
        maker: The command, recorded in the file as MADE_BY.
        keys: Keys by which files of earlier versions are recognised, which lack MADE_BY.
    """

    maker: str
    keys: frozenset[str]

    def marked(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return `content` with the maker added."""
        return {MADE_BY: self.maker, **content}

    def is_ours(self, file: Path) -> bool:
        """Return whether the file names this maker, or has the keys. Raises OSError, ValueError."""
        if file.stat().st_size > MAX_JSON_BYTES:
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
    """A folder that a command creates, fills and removes."""

    maker: str
    is_ours: Callable[[Path], bool]


AnyKind = Kind | JsonKind | FolderKind


def starts_with(*texts: bytes) -> Callable[[Path], bool]:
    """Return a test for files that contain all of `texts` within their first 4096 bytes."""

    def test(path: Path) -> bool:
        with path.open("rb") as file:
            start = file.read(4096)
        return all(text in start for text in texts)

    return test


def check_output_file(
    file: Path,
    kind: Kind | JsonKind,
    *,
    inputs: Iterable[Path] = (),
    outputs: Iterable[Path] = (),
    bundle: Path | None = None,
) -> None:
    """Refuse an output file that would overwrite anything but an earlier output of its command.

    Args:
        file: The output. A link is followed: the file that it leads to is checked.
        kind: What the command writes.
        inputs: Files that the command reads; none of them may be the output.
        outputs: Other files and folders that the command writes; the output must be neither one of them nor inside.
        bundle: Folder that the command reads as a bundle, whatever is in it. No output may be inside of any bundle.

    Raises:
        OverwriteError: If the output is refused or cannot be written.
    """
    place = Path(os.path.realpath(file))
    if enclosing_bundle(place) or (bundle is not None and place.is_relative_to(bundle.resolve())):
        raise OverwriteError(f"{file} is inside of the bundle, which must hold no other files; give another place")
    if any(place == Path(os.path.realpath(source)) for source in inputs):
        raise OverwriteError(f"{file} is one of the files to read; give another place")
    for other in outputs:
        if place.is_relative_to(os.path.realpath(other)):
            raise OverwriteError(f"{file} is where the command writes {other}; give another place")
    _check_content(file, place, kind)
    _check_writable(file, place)


def check_output_folder(folder: Path, kinds: Mapping[str, AnyKind], *, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output folder in which the command would overwrite a file that it did not write.

    Args:
        folder: The output folder.
        kinds: What the command writes into the folder, by file name. Other files are not touched.
        inputs: Files and folders that the command reads; the folder must not be one of them, or inside of one.

    Raises:
        OverwriteError: If the folder is refused or cannot be written to.
    """
    place = Path(os.path.realpath(folder))
    for source in (Path(os.path.realpath(source)) for source in inputs):
        if place == source:
            raise OverwriteError(f"{folder} is read by this command; give another folder to write to")
        if place.is_relative_to(source):
            raise OverwriteError(f"{folder} is inside of {source}, which is read by this command; give another folder")
    if (status := _status(folder, place)) is not None and not stat.S_ISDIR(status.st_mode):
        raise OverwriteError(f"{folder} is a file; expected a folder to write to: {REMEDY}")
    if bundle := enclosing_bundle(place / "x"):
        raise OverwriteError(
            f"files in {folder} would be inside of the bundle {bundle}, which must hold no others; give another folder"
        )
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
    """Return a test for folders that contain only files of these patterns, and scratch files."""

    def test(folder: Path) -> bool:
        return folder.is_dir() and all(
            any(path.match(name) for name in (*names, f".*.{MARK}-*.tmp", ".*.tmp")) and not path.is_dir()
            for path in folder.iterdir()
        )

    return test


def _status(path: Path, place: Path) -> os.stat_result | None:
    """Return the status of `place`, None if there is nothing. Raises OverwriteError if nothing can be there."""
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
            f"{path} exists and was not written by {kind.maker} ({_described(place)}); it would be overwritten: "
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
    """Create and remove a scratch file in the folder of `place`, or in its nearest parent. Raises OverwriteError."""
    folder = place.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        check_can_create(folder / place.name)
    except OSError as error:
        why = "a part of it is a file" if error.errno == errno.ENOTDIR else error.strerror or error
        raise OverwriteError(f"{path} cannot be written: {why}; give another place") from None
