"""Finds the heads in a folder or hub repository from the headers of safetensors files, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors

from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.heads.files import CONFIG_NAME, INDEX_NAME, weights_files
from medusa_exporter.heads.layouts import INDEX_NAMES, Layout, canonical_names, detect_layout

MAX_HEADER_BYTES = 16 * 2**20  # bytes; the header of real heads takes a few kilobytes
REMEDY = "download or make it again"
STORED_TYPES = ("F16", "BF16", "F32")
INDEX_TYPES = ("I64",)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a safetensors header describes it; `dtype` is the format's name, such as F16."""

    file: Path
    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class StoredHeads:
    """The heads that were found in a folder or hub repository.

    Attributes:
        where: File or folder, for messages.
        layout: The published layout that their names follow.
        entries: The tensors by the Medusa authors' names (see `layouts`); `None` for a bias that is zero.
    """

    where: str
    layout: Layout
    entries: dict[str, TensorInfo | None]

    @property
    def files(self) -> list[Path]:
        """Return the files that contain the heads, sorted."""
        return sorted({entry.file for entry in self.entries.values() if entry})

    @property
    def shapes(self) -> dict[str, Shape]:
        """Return the shape of every weight by the authors' names.

        A bias that is left out has one value per row of its weight: (64,) for a weight of (64, 32).
        """
        known = {name: entry.shape for name, entry in self.entries.items() if entry}
        left_out = [name for name, entry in self.entries.items() if not entry]
        return known | {name: known[name.removesuffix("bias") + "weight"][:1] for name in left_out}

    @property
    def names(self) -> dict[str, str]:
        """Return the names of the weights in the files, by the authors' names."""
        return {name: entry.name for name, entry in self.entries.items() if entry}


def find_heads(source: str | Path) -> StoredHeads:
    """Find the heads in a folder or hub repository, in any published layout; only headers are read.

    They are looked for in this order: medusa_lm_head.safetensors, the shards that model.safetensors.index.json names,
    all .safetensors files of the folder.

    Args:
        source: A folder, or a hub name `owner/name` or `owner/name@revision`, whose files are downloaded.

    Raises:
        HeadsError: There are no heads, or they are damaged.
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
    for name, entry_found in found.items():
        types = INDEX_TYPES if name in INDEX_NAMES else STORED_TYPES
        if entry_found and entry_found.dtype not in types:
            raise HeadsError(
                f"{entry_found.file}: {entry_found.name} is stored as {entry_found.dtype}; expected "
                f"{' or '.join(types)}: give heads that are not quantised"
            )
    return StoredHeads(where, layout, found)


def heads_files(source: str | Path) -> list[Path]:
    """Return the local files that loading `source` reads; empty for a hub name."""
    folder = Path(source).expanduser()
    if not folder.exists():
        return []
    files = [*find_heads(source).files, folder / CONFIG_NAME, folder / INDEX_NAME]
    return sorted({file for file in files if file.is_file()})


def read_header(path: Path) -> list[TensorInfo]:
    """Read the names, types and shapes of all tensors in a safetensors file; no tensor is read.

    Raises:
        HeadsError: The file is truncated, or its header is damaged or longer than 16 MiB.
    """
    size = path.stat().st_size
    with path.open("rb") as file:  # safe_open accepts headers of 100 MB, whose parsing takes many times as much
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > MAX_HEADER_BYTES:
        raise HeadsError(f"{path}: not a safetensors file (header of {length} bytes in a file of {size}); {REMEDY}")
    try:
        with safetensors.safe_open(path, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 -- not a mapping
            return [
                TensorInfo(path, name, str(one.get_dtype()), tuple(one.get_shape())) for name, one in slices.items()
            ]
    except (safetensors.SafetensorError, ValueError) as error:
        raise HeadsError(f"{path}: not a safetensors file, or damaged ({error}); {REMEDY}") from error
