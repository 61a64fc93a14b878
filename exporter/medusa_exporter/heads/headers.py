"""Heads as they lie on disk: what the safetensors headers say, and which weight is which. Without torch."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.heads.files import CONFIG_NAME, INDEX_NAME, weights_files
from medusa_exporter.heads.layouts import INDEX_NAMES, Layout, canonical_names, detect_layout

LARGEST_HEADER = 16 * 2**20  # bytes; a header of real heads takes a few kilobytes
STORED_TYPES = ("F16", "BF16", "F32")
INDEX_TYPES = ("I64",)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorInfo:
    """One weight as a safetensors header states it; `dtype` is the format's name, such as F16."""

    file: Path
    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class StoredHeads:
    """Heads as they were found. `entries`: by the authors' names (see `layouts`), None for a bias that is zero."""

    where: str
    layout: Layout
    entries: dict[str, TensorInfo | None]

    @property
    def files(self) -> list[Path]:
        """The files that hold the heads, sorted."""
        return sorted({entry.file for entry in self.entries.values() if entry})

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of every weight by the authors' names; one that is left out is as long as its linear is high."""
        known = {name: entry.shape for name, entry in self.entries.items() if entry}
        left_out = [name for name, entry in self.entries.items() if not entry]
        return known | {name: known[name.removesuffix("bias") + "weight"][:1] for name in left_out}

    @property
    def names(self) -> dict[str, str]:
        """What the weights are called in the files, by the authors' names."""
        return {name: entry.name for name, entry in self.entries.items() if entry}


def find_heads(source: str | Path) -> StoredHeads:
    """Find the heads of a folder or hub name ('owner/name', fetched), in any layout, from headers alone.

    Looked for in this order: medusa_lm_head.safetensors, the shards that model.safetensors.index.json names, all
    .safetensors of the folder. Raises HeadsError when there are none or they are damaged.
    """
    files = weights_files(source)
    entries: dict[str, TensorInfo] = {}
    for entry in (entry for file in files for entry in read_header(file)):
        if entry.name in entries:
            raise HeadsError(
                f"{source}: both {entries[entry.name].file.name} and {entry.file.name} hold {entry.name!r}; expected "
                "each weight once. Heads split over several ranks must be joined first"
            )
        entries[entry.name] = entry
    where = str(files[0] if len(files) == 1 else source)
    layout = detect_layout(entries, where)
    mapped = canonical_names(entries, layout, where)
    found = {name: entries[stored] if stored else None for name, stored in mapped.items()}
    for name, held in found.items():
        types = INDEX_TYPES if name in INDEX_NAMES else STORED_TYPES
        if held and held.dtype not in types:
            raise HeadsError(
                f"{held.file}: {held.name} is stored as {held.dtype}; expected {' or '.join(types)}: give heads that "
                "are not quantised"
            )
    return StoredHeads(where, layout, found)


def heads_files(source: str | Path) -> list[Path]:
    """The local files that loading `source` reads; empty for a hub name."""
    folder = Path(source).expanduser()
    if not folder.exists():
        return []
    files = [*find_heads(source).files, folder / CONFIG_NAME, folder / INDEX_NAME]
    return sorted({file for file in files if file.is_file()})


def read_header(path: Path) -> list[TensorInfo]:
    """Read what a safetensors file says of its weights; raise HeadsError when the header is damaged.

    A file opens with 8 bytes, the header's length in little-endian, and the header in JSON. Source: the format's
    description in huggingface/safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise HeadsError(f"{path}: not a safetensors file (header of {length} bytes in a file of {size})")
        raw = file.read(length)
    try:
        stated = json.loads(raw.decode("utf-8"))
        return [
            TensorInfo(path, name, str(entry["dtype"]), tuple(int(size) for size in entry["shape"]))
            for name, entry in stated.items()
            if name != "__metadata__"
        ]
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise HeadsError(f"{path}: its safetensors header is damaged ({type(error).__name__}: {error})") from error
