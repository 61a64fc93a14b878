"""The files in a bundle's folder: listing them, resolving their names safely, and hashing them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from medusa_runtime.errors import BundleError
from medusa_runtime.manifest import REMEDY
from medusa_runtime.verified_file import FileStamp, hash_file

SCRATCH = ".manifest.json.tmp"  # the manifest while it is being written

# What a hub's tools add to a bundle's folder: not part of the bundle, never listed in its manifest and never read.
IGNORED_NAMES = ("README.md", ".gitattributes", ".cache", ".git")

_HASH_THREADS = 4


def resolve_inside(root: Path, name: str) -> Path:
    """Return the regular file that `name` refers to; raise BundleError if it is no file or is outside `root`."""
    try:
        path = (root / name).resolve(strict=True)
    except FileNotFoundError:
        raise BundleError(f"{root} lacks {name!r}, which its manifest lists; {REMEDY}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise BundleError(f"{name!r} of {root} cannot be resolved: {error}; {REMEDY}") from None
    if not path.is_relative_to(root) and not _in_cache(root, path):
        raise BundleError(f"{name!r} of {root} is a link that leaves the bundle; put the file itself there")
    if not stat.S_ISREG(path.stat().st_mode):
        raise BundleError(f"{name!r} of {root} is not a regular file; {REMEDY}")
    return path


def _in_cache(root: Path, path: Path) -> bool:
    """Whether `root` is a snapshot in a Hugging Face Hub cache and `path` is in the part that stores file contents.

    A snapshot is CACHE/models--OWNER--NAME/snapshots/REVISION. Its files are links into models--OWNER--NAME/blobs,
    whose entries may be links into CACHE/blobs/xx (see huggingface_hub's guide to its cache).
    """
    repository = root.parent.parent
    if root.parent.name != "snapshots" or "--" not in repository.name:
        return False
    return path.parent == repository / "blobs" or path.parent.parent == repository.parent / "blobs"


def walk(root: Path) -> Iterator[str]:
    """Yield the POSIX path, relative to `root`, of everything but plain folders; links to folders are included.

    `IGNORED_NAMES` in `root` itself are skipped. Raises OSError.
    """

    def fail(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(root, onerror=fail):
        if Path(place) == root:
            folders[:] = [name for name in folders if name not in IGNORED_NAMES]
            files[:] = [name for name in files if name not in (*IGNORED_NAMES, SCRATCH)]
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in [*files, *links]:
            yield (Path(place) / name).relative_to(root).as_posix()


def read_bounded(path: Path, limit: int) -> bytes:
    """Read at most `limit` + 1 bytes of a file, so that the caller can detect a longer file."""
    with path.open("rb") as file:
        return file.read(limit + 1)


def hash_files(paths: Iterable[Path]) -> list[tuple[str, FileStamp | None]]:
    """Return the SHA-256 and stamp of each file, hashed in parallel (hashlib releases the GIL)."""
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return list(pool.map(hash_file, paths))
