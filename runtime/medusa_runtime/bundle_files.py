"""What lies in a bundle's folder: which entries are part of it, where each name leads, and their digests."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from medusa_runtime.errors import BundleError
from medusa_runtime.manifest import REMEDY
from medusa_runtime.verified_file import FileStamp, hash_file

SCRATCH = ".manifest.json.tmp"  # a manifest that is being written

# What the tools of a hub put into a bundle's folder: never listed, never read, and not part of the bundle.
IGNORED_NAMES = ("README.md", ".gitattributes", ".cache", ".git")

_HASH_THREADS = 4


def resolve_inside(root: Path, name: str) -> Path:
    """Return the regular file that `name` leads to; BundleError if it is none or lies outside `root`."""
    try:
        path = (root / name).resolve(strict=True)
    except FileNotFoundError:
        raise BundleError(f"{root} lacks {name!r}, which its manifest lists; {REMEDY}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise BundleError(f"{name!r} of {root} leads nowhere: {error}; {REMEDY}") from None
    if not path.is_relative_to(root) and not _in_cache(root, path):
        raise BundleError(f"{name!r} of {root} is a link that leaves the bundle; put the file itself there")
    if not stat.S_ISREG(path.stat().st_mode):
        raise BundleError(f"{name!r} of {root} is not a regular file; {REMEDY}")
    return path


def _in_cache(root: Path, path: Path) -> bool:
    """Tell whether `root` is a snapshot in a Hugging Face hub's cache, and `path` where that cache keeps contents.

    A snapshot is CACHE/models--OWNER--NAME/snapshots/REVISION; its files are links into the `blobs`
    of models--OWNER--NAME, and what lies there may link into CACHE/blobs/xx (huggingface_hub's guide to its cache).
    """
    repository = root.parent.parent
    if root.parent.name != "snapshots" or "--" not in repository.name:
        return False
    return path.parent == repository / "blobs" or path.parent.parent == repository.parent / "blobs"


def walk(root: Path) -> Iterator[str]:
    """Give the POSIX path below `root` of everything that is not a plain folder, links to folders included.

    What may lie in a bundle's folder without being part of it (IGNORED_NAMES) is left out. Raises OSError.
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
    """Read a file, one byte beyond `limit` at most, so that a longer one shows without filling the memory."""
    with path.open("rb") as file:
        return file.read(limit + 1)


def hash_files(paths: Iterable[Path]) -> list[tuple[str, FileStamp | None]]:
    """Hash files side by side, in their order (hashlib lets other threads run)."""
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return list(pool.map(hash_file, paths))
