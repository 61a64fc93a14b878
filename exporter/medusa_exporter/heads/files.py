"""Finds the files that contain the heads of a folder or hub name, and downloads those of the hub; without torch."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from medusa_exporter.extras import import_extra
from medusa_exporter.files import finish_interrupted_write
from medusa_exporter.heads.errors import HeadsError, RevisionError
from medusa_exporter.heads.layouts import detect_layout
from medusa_exporter.hub import split_revision

WEIGHTS_NAME = "medusa_lm_head.safetensors"
CONFIG_NAME = "config.json"
PICKLE_NAME = "medusa_lm_head.pt"
PICKLE_SUFFIXES = (".pt", ".pth", ".bin")
INDEX_NAME = "model.safetensors.index.json"
MERGED_NAME = "model.safetensors"
MAX_JSON_BYTES = 16 * 2**20  # bytes


def weights_files(source: str | Path) -> list[Path]:
    """Return the safetensors files of a folder or hub name that may contain heads; raise HeadsError for none."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        finish_interrupted_write(folder)
        if (folder / WEIGHTS_NAME).is_file():
            return [folder / WEIGHTS_NAME]
        if (folder / PICKLE_NAME).is_file():
            raise HeadsError(_pickle_refusal(source, source))
        if (folder / INDEX_NAME).is_file():
            return [_shard(folder, name) for name in _indexed_shards(folder / INDEX_NAME)]
        if files := sorted(folder.glob("*.safetensors")):
            return files
        if pickles := sorted(file for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES):
            raise HeadsError(_pickle_refusal(source, pickles[0]))
        raise HeadsError(
            f"{folder}: a folder without {WEIGHTS_NAME} or other safetensors; give a folder of Medusa heads"
        )
    if folder.exists():
        if folder.suffix in PICKLE_SUFFIXES:
            raise HeadsError(_pickle_refusal(source, source))
        raise HeadsError(f"{folder}: a file; expected the folder that holds {WEIGHTS_NAME}")
    return _hub_weights(str(source))


def pickle_file(source: str | Path) -> Path | None:
    """Return the pickle that `medusa-export heads convert` reads, `None` if there are safetensors.

    A file ending in .pt, .pth or .bin is one itself; in a folder or hub repository it is medusa_lm_head.pt.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path if path.suffix in PICKLE_SUFFIXES else None
    if path.is_dir():
        found = (path / PICKLE_NAME).is_file() and not (path / WEIGHTS_NAME).is_file()
        return path / PICKLE_NAME if found else None
    _check_hub_name(str(source))
    for name in (WEIGHTS_NAME, PICKLE_NAME):
        try:
            file = hub_file(str(source), name)
        except HeadsError:
            continue
        return file if name == PICKLE_NAME else None
    return None


def hub_file(name: str, file: str) -> Path:
    """Download one file of a hub repository, `owner/name` or `owner/name@revision`.

    Raises:
        HeadsError: The hub has no such repository, revision or file, or cannot be reached.
    """
    _check_hub_name(name)
    hub = import_extra("huggingface_hub", "export")
    repository, revision = split_revision(name)
    try:
        return Path(hub.hf_hub_download(repository, file, revision=revision))
    except hub.errors.RevisionNotFoundError as error:
        raise RevisionError(
            f"{repository}: the hub repository has no revision {revision!r}; expected a branch, tag or commit of it: "
            "look at the repository's files on the hub, or leave the revision out for its main branch"
        ) from error
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).strip().splitlines()[:1])
        raise HeadsError(f"{name}: neither a local folder nor a hub repository that gives {file} ({reason})") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most 16 MiB; raise HeadsError for any other file."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise HeadsError(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_JSON_BYTES}; repair or remove it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise HeadsError(f"{path}: not valid JSON ({error}); repair or remove it") from error
    if not isinstance(content, dict):
        raise HeadsError(f"{path}: holds {type(content).__name__}, expected a JSON object; repair or remove it")
    return content


def _hub_weights(name: str) -> list[Path]:
    try:
        return [hub_file(name, WEIGHTS_NAME)]
    except RevisionError:
        raise
    except HeadsError as error:
        missing = error
    try:
        index = hub_file(name, INDEX_NAME)
    except HeadsError:
        shards = [MERGED_NAME]
    else:
        shards = _indexed_shards(index)
    try:
        return [hub_file(name, shard) for shard in shards]
    except HeadsError:
        raise HeadsError(
            f"{missing}. A repository with {PICKLE_NAME} only must be converted first, since pickles are not loaded: "
            f"{_convert_command(name)}"
        ) from missing


def _indexed_shards(index: Path) -> list[str]:
    """Return the names of the shards with heads by the index of a model; raise HeadsError if it is damaged."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise HeadsError(f"{index}: no weight_map from weights to files in it; download or make it again")
    layout = detect_layout(places, str(index))
    shards = sorted({file for name, file in places.items() if layout.owns(name)})
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise HeadsError(
                f"{index}: names {shard!r} as a shard; expected a .safetensors file next to the index: "
                "download or make the index again"
            )
    return shards


def _shard(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise HeadsError(f"{folder}: {INDEX_NAME} names {name}, which is missing; download it or make the folder again")
    return folder / name


def _check_hub_name(name: str) -> None:
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise HeadsError(
            f"{name}: no such folder, and not a hub name of the form 'owner/name'; give one of the two, "
            f"a folder with {WEIGHTS_NAME} in it"
        )


def _pickle_refusal(where: str | Path, source: str | Path) -> str:
    return (
        f"{where}: has pickled weights only; pickles can run code and are not loaded here. Expected safetensors: "
        f"convert the weights, which reads nothing but tensors: {_convert_command(source)}"
    )


def _convert_command(source: str | Path) -> str:
    return f"medusa-export heads convert {shlex.quote(str(source))} -o HEADS"
