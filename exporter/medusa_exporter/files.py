"""Files that appear whole: whoever reads one finds what lay there before, or all of the new."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from medusa_runtime.errors import MedusaError

_BLOCK = 4 << 20  # bytes read and hashed at a time
_NUMBERS = re.compile(r"\[\n[\s\d,-]+\]")  # of whole numbers, over several lines; no JSON text holds a line break


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a scratch file beside `path` that takes its place when the block ends, and is removed when it raises."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            yield file
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path` as strict JSON, indented by 2, each list of whole numbers on one line.

    Raises ValueError or TypeError for what JSON cannot say.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    text = _NUMBERS.sub(lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text)
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`."""
    with written_whole(path) as file:
        file.write(content)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_output(file: Path, bundle: Path) -> None:
    """Make the folder that is to hold `file`, before hours of work; MedusaError for a place that cannot serve."""
    if file.is_dir():
        raise MedusaError(f"{file} is a folder; give the file to write")
    if file.resolve().is_relative_to(bundle.resolve()):
        raise MedusaError(f"{file} lies in the bundle, which must hold no other files; give another place")
    file.parent.mkdir(parents=True, exist_ok=True)
