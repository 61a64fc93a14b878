"""What a file of heads holds, read from the names and shapes in its header, without torch.

The layout ("version 2" of the published ones): `medusa_lm_head.safetensors` with `{head}.{layer}.linear.weight`
(out, in), `{head}.{layer}.linear.bias` (out) and, where a head has an lm_head of its own,
`{head}.{layers}.weight` (V, H). Source: the Medusa authors' checkpoints. Beside them `token_map` (D,) int64 may stand,
as in vLLM's layout: the token that each row of the lm_head scores; own lm_heads then have D rows, or V of which D are
read.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medusa_runtime.errors import UnsupportedModelError

from medusa_exporter.models import import_extra

WEIGHTS_NAME = "medusa_lm_head.safetensors"
CONFIG_NAME = "config.json"
PICKLE_NAME = "medusa_lm_head.pt"
LARGEST_HEADER = 16 * 2**20  # bytes; a header of real heads takes a few kilobytes
STORED_TYPES = ("F16", "BF16", "F32")
MAP_NAME = "token_map"
MAP_TYPES = ("I64",)

_LINEAR = re.compile(r"(\d{1,4})\.(\d{1,4})\.linear\.(weight|bias)")
_LM_HEAD = re.compile(r"(\d{1,4})\.(\d{1,4})\.weight")


class HeadsError(UnsupportedModelError):
    """Heads that are missing, damaged, of an unknown layout or of another model."""


@dataclass(frozen=True)
class HeadFacts:
    """What names and shapes say.

    own_lm_head_size: rows of each head's own lm_head, or None when the decoder's is shared. draft_vocabulary: how many
    tokens the heads score, or None when they score all.
    """

    heads: int
    layers: int
    conditioning: Literal["none", "root"]
    hidden_size: int
    own_lm_head_size: int | None
    draft_vocabulary: int | None = None


def read_head_facts(source: str | Path) -> tuple[int, int, str]:
    """Return (heads, layers per head, conditioning) of a folder or hub name; raise HeadsError for what is none."""
    path = weights_file(source)
    facts = layout_facts(read_shapes(path), path)
    return facts.heads, facts.layers, facts.conditioning


def heads_files(source: str | Path) -> list[Path]:
    """The local files that loading `source` reads; empty for a hub name."""
    folder = Path(source).expanduser()
    if not folder.exists():
        return []
    return [file for file in (folder / CONFIG_NAME, weights_file(source)) if file.is_file()]


def weights_file(source: str | Path) -> Path:
    """Find the weights of a folder or hub name ('owner/name', fetched); raise HeadsError when there are none."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        path = folder / WEIGHTS_NAME
        if path.is_file():
            return path
        if any(folder.glob("*.pt")) or any(folder.glob("*.bin")):
            raise HeadsError(_pickle_refusal(str(folder)))
        raise HeadsError(f"{folder}: a folder without {WEIGHTS_NAME}; give a folder of Medusa heads in that layout")
    if folder.exists():
        if folder.suffix in (".pt", ".bin", ".pth"):
            raise HeadsError(_pickle_refusal(str(folder)))
        raise HeadsError(f"{folder}: a file; expected the folder that holds {WEIGHTS_NAME}")
    return hub_file(str(source), WEIGHTS_NAME)


def hub_file(name: str, file: str) -> Path:
    """Fetch one file of the hub's repository `name`; raise HeadsError when the hub does not give it."""
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise HeadsError(
            f"{name}: no such folder, and not a hub name of the form 'owner/name'; give one of the two, "
            f"a folder with {WEIGHTS_NAME} in it"
        )
    hub = import_extra("huggingface_hub", "export")
    try:
        return Path(hub.hf_hub_download(name, file))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise HeadsError(
            f"{name}: neither a local folder nor a hub repository that gives {file} ({' '.join(reason)}). A repository "
            f"with {PICKLE_NAME} only cannot be used: pickles are not loaded; convert it to safetensors"
        ) from error


def _pickle_refusal(where: str) -> str:
    return (
        f"{where}: holds pickled weights only; pickles can run code and are not loaded. Expected {WEIGHTS_NAME}: "
        "convert the weights with safetensors.torch.save_file where you trust them"
    )


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read names and shapes from a safetensors header; raise HeadsError when the header is damaged.

    A file opens with 8 bytes, the header's length in little-endian, and the header in JSON.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise HeadsError(f"{path}: not a safetensors file (header of {length} bytes in a file of {size})")
        raw = file.read(length)
    try:
        entries = json.loads(raw.decode("utf-8"))
        return {name: _entry_shape(name, entry, path) for name, entry in entries.items() if name != "__metadata__"}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise HeadsError(f"{path}: its safetensors header is damaged ({type(error).__name__}: {error})") from error


def _entry_shape(name: str, entry: Any, path: Path) -> tuple[int, ...]:
    types = MAP_TYPES if name == MAP_NAME else STORED_TYPES
    if entry["dtype"] not in types:
        raise HeadsError(f"{path}: {name} is stored as {entry['dtype']}; expected {' or '.join(types)}")
    return tuple(int(size) for size in entry["shape"])


def layout_facts(shapes: dict[str, tuple[int, ...]], path: Path) -> HeadFacts:
    """Derive the facts from names and shapes.

    Raises HeadsError for unknown names, gaps in the numbering, heads of different depth, missing biases and
    shapes that do not fit together.
    """
    draft_vocabulary = _draft_vocabulary(shapes, path)
    shapes = {name: shape for name, shape in shapes.items() if name != MAP_NAME}
    linears, lm_heads = _sort_names(shapes, path)
    heads = _count({head for head, _, _ in linears} | {head for head, _ in lm_heads}, "heads", path)
    depths = [1 + max((layer for owner, layer, _ in linears if owner == head), default=-1) for head in range(heads)]
    if len(set(depths)) != 1 or depths[0] == 0:
        raise HeadsError(f"{path}: heads of {depths} layers; expected one depth of at least 1 for all heads")
    layers = depths[0]
    hidden_size = _size(shapes, "0.0.linear.weight", 0, path)
    first = _size(shapes, "0.0.linear.weight", 1, path)
    conditioning: Literal["none", "root"] = "root" if first == 2 * hidden_size else "none"
    expected: dict[str, tuple[int, ...]] = {}
    for head in range(heads):
        for layer in range(layers):
            width = first if layer == 0 and conditioning == "root" else hidden_size
            expected[f"{head}.{layer}.linear.weight"] = (hidden_size, width)
            expected[f"{head}.{layer}.linear.bias"] = (hidden_size,)
    own_size = None
    if lm_heads:
        own_size = _size(shapes, f"0.{layers}.weight", 0, path)
        if own_size < (draft_vocabulary or 0):
            raise HeadsError(
                f"{path}: lm_heads of {own_size} rows under a token_map of {draft_vocabulary} tokens; expected a row "
                "for each; damaged or of another layout"
            )
        expected |= {f"{head}.{layers}.weight": (own_size, hidden_size) for head in range(heads)}
    for name in sorted(expected.keys() | shapes.keys()):
        if shapes.get(name) != expected.get(name):
            raise HeadsError(
                f"{path}: {name} has shape {shapes.get(name, 'missing')}, expected {expected.get(name, 'none')} "
                f"({heads} heads of {layers} layers, hidden size {hidden_size}); damaged or of another layout"
            )
    return HeadFacts(heads, layers, conditioning, hidden_size, own_size, draft_vocabulary)


def _draft_vocabulary(shapes: dict[str, tuple[int, ...]], path: Path) -> int | None:
    if MAP_NAME not in shapes:
        return None
    shape = shapes[MAP_NAME]
    if len(shape) != 1 or shape[0] < 1:
        raise HeadsError(f"{path}: {MAP_NAME} has shape {shape}, expected (D,): one token id for each lm_head row")
    return shape[0]


def _sort_names(
    shapes: dict[str, tuple[int, ...]], path: Path
) -> tuple[list[tuple[int, int, str]], list[tuple[int, int]]]:
    linears: list[tuple[int, int, str]] = []
    lm_heads: list[tuple[int, int]] = []
    for name in sorted(shapes):
        if match := _LINEAR.fullmatch(name):
            linears.append((int(match[1]), int(match[2]), match[3]))
        elif match := _LM_HEAD.fullmatch(name):
            lm_heads.append((int(match[1]), int(match[2])))
        else:
            raise HeadsError(
                f"{path}: unknown weight {name!r}; expected {{head}}.{{layer}}.linear.weight, "
                "{head}.{layer}.linear.bias and {head}.{layers}.weight (version 2 of the Medusa layout)"
            )
    if not linears:
        raise HeadsError(f"{path}: no head in it; expected 0.0.linear.weight and further")
    return linears, lm_heads


def _size(shapes: dict[str, tuple[int, ...]], name: str, axis: int, path: Path) -> int:
    shape = shapes.get(name, ())
    if len(shape) != 2 or min(shape) < 1:
        raise HeadsError(f"{path}: {name} has shape {shapes.get(name, 'missing')}, expected two sizes of at least 1")
    return shape[axis]


def _count(numbers: set[int], what: str, path: Path) -> int:
    if numbers != set(range(len(numbers))):
        raise HeadsError(f"{path}: {what} are numbered {sorted(numbers)}; expected 0, 1, 2 … without a gap")
    return len(numbers)
