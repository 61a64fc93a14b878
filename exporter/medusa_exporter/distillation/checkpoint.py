"""Checkpoints of a distillation: every finished batch is saved in a separate file, so that a run can resume."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from medusa_exporter.distillation.dataset import DataError, DataFacts
from medusa_exporter.distillation.scripts import GeneratedRow
from medusa_exporter.files import atomic_write
from medusa_exporter.output_kinds import PARTIAL
from medusa_exporter.resume import describe_differences

PLAN_NAME = "plan.json"
REPLACES = "replaces_data"  # the key of plan.json that marks a run with --force over a finished data set


def open_checkpoint(folder: Path, facts: DataFacts, *, replaces: bool = False) -> Path:
    """Create or reopen the folder of finished batches.

    Args:
        folder: The data set's folder.
        facts: What is distilled; decides whether the batches that are there may be used.
        replaces: Whether this run, when it is complete, replaces a finished data set. A run that is reopened keeps
            what it was started with.

    Returns:
        The folder of finished batches, `partial` in the data set's.

    Raises:
        DataError: The folder holds the batches of a run with other arguments.
    """
    partial, plan = folder / PARTIAL, json.loads(json.dumps(asdict(facts)))
    if (saved := _read_plan(folder)) is not None:
        replaces = saved.pop(REPLACES, False)
        if differing := describe_differences(saved, plan):
            raise DataError(
                f"{partial}: an interrupted run with other arguments left its work here ({differing}); give the same "
                "arguments to resume it, another folder, or --force to distill anew"
            )
    partial.mkdir(parents=True, exist_ok=True)
    with atomic_write(partial / PLAN_NAME) as file:
        file.write(json.dumps({**plan, REPLACES: replaces}).encode())
    return partial


def replaces_data(folder: Path) -> bool:
    """Return whether a run with --force over the finished data set in `folder` was interrupted."""
    return bool((_read_plan(folder) or {}).get(REPLACES))


def remove_checkpoint(folder: Path) -> None:
    """Remove the finished batches in the data set's folder; the plan goes last, so that what is left stays valid."""
    for path in (folder / PARTIAL).glob("*"):
        if path.name != PLAN_NAME:
            path.unlink(missing_ok=True)
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)


def save_batch(partial: Path, batch: int, rows: Sequence[GeneratedRow]) -> None:
    """Save the rows of a batch; the file appears complete or not at all."""
    with atomic_write(_path(partial, batch)) as file:
        np.savez(
            file,
            lengths=np.array([len(row.tokens) for row in rows], np.int64),
            tokens=np.concatenate([row.tokens for row in rows]).astype(np.uint32),
            roles=np.concatenate([row.roles for row in rows]),
        )


def is_saved(partial: Path, batch: int) -> bool:
    """Return whether a batch was saved."""
    return _path(partial, batch).is_file()


def load_batch(partial: Path, batch: int) -> list[GeneratedRow]:
    """Load the rows of a saved batch.

    Raises:
        DataError: The file is damaged.
    """
    path = _path(partial, batch)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as part:
            stops = np.cumsum(part["lengths"])[:-1]
            tokens, roles = np.split(part["tokens"].astype(np.int64), stops), np.split(part["roles"], stops)
        return [GeneratedRow(*row) for row in zip(tokens, roles, strict=True)]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: damaged ({type(error).__name__}: {error}); delete the file to generate this batch again"
        ) from error


def _read_plan(folder: Path) -> dict[str, Any] | None:
    path = folder / PARTIAL / PLAN_NAME
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error}); --force distills anew") from error


def _path(partial: Path, batch: int) -> Path:
    return partial / f"batch-{batch:05}.npz"
