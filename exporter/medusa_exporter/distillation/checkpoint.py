"""Unfinished work: each finished wave lies in a file of its own, so that a broken-off run can go on."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from medusa_exporter.distillation.dataset import DataError, DataFacts
from medusa_exporter.distillation.scripts import GeneratedRow
from medusa_exporter.files import atomic_write
from medusa_exporter.output_kinds import PARTIAL


def open_checkpoint(folder: Path, facts: DataFacts) -> Path:
    """Make the folder of unfinished work in `folder`; raise DataError when another plan's lies there."""
    partial = folder / PARTIAL
    partial.mkdir(parents=True, exist_ok=True)
    plan, path = json.dumps(asdict(facts)), partial / "plan.json"
    if path.is_file() and path.read_text(encoding="utf-8") != plan:
        raise DataError(f"{partial}: work begun with other arguments; give the same ones, or another folder")
    with atomic_write(path) as file:
        file.write(plan.encode())
    return partial


def save_batch(partial: Path, wave: int, lines: Sequence[GeneratedRow]) -> None:
    """Write a wave's lines; the file is whole or not there."""
    with atomic_write(_path(partial, wave)) as file:
        np.savez(
            file,
            lengths=np.array([len(line.tokens) for line in lines], np.int64),
            tokens=np.concatenate([line.tokens for line in lines]).astype(np.uint32),
            roles=np.concatenate([line.roles for line in lines]),
        )


def is_saved(partial: Path, wave: int) -> bool:
    """Whether the wave was put away."""
    return _path(partial, wave).is_file()


def load_batch(partial: Path, wave: int) -> list[GeneratedRow]:
    """Read a finished wave's lines; raise DataError for a damaged file."""
    path = _path(partial, wave)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as part:
            stops = np.cumsum(part["lengths"])[:-1]
            tokens, roles = np.split(part["tokens"].astype(np.int64), stops), np.split(part["roles"], stops)
        return [GeneratedRow(*line) for line in zip(tokens, roles, strict=True)]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error}); delete it to write it again") from error


def _path(partial: Path, wave: int) -> Path:
    return partial / f"wave-{wave:05}.npz"
