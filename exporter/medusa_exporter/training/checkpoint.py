"""Checkpoints of a training run: weights, optimizer state and step in safetensors and JSON, never a pickle."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from medusa_exporter.distillation.dataset import DataError
from medusa_exporter.files import write_json
from medusa_exporter.output_kinds import CHECKPOINT as FOLDER
from medusa_exporter.resume import describe_differences

STATE, META = "state.safetensors", "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


@dataclass(frozen=True)
class TrainingProgress:
    """How far training has come: steps done, steps in all, positions per step, seconds spent on steps."""

    step: int
    total: int
    batch: int
    seconds: float


def save(folder: Path, progress: TrainingProgress, run: dict[str, Any], model: torch.nn.Module, optimiser: Any) -> None:
    """Replace the checkpoint in `folder`.

    A complete checkpoint exists at every moment: the new one is written as `checkpoint.new`, the old one becomes
    `checkpoint.old`, and both are renamed, so a process that is killed in between leaves one of the two.

    Args:
        folder: The output folder of the training run.
        progress: How far training has come.
        run: What is trained, see `training.resume.describe_run`.
        model: The module whose parameters are saved.
        optimiser: Its AdamW optimizer.
    """
    tensors = {f"weight.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = optimiser.state[parameter][moment]
    new, place, old = (folder / f"{FOLDER}{suffix}" for suffix in (".new", "", ".old"))
    if (new / META).is_file() and not place.exists():  # the only checkpoint that a killed run left
        new.rename(place)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    safetensors.torch.save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, new / STATE)
    write_json(new / META, {"progress": progress.__dict__, "run": run})  # written last: it marks a complete checkpoint
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def exists(folder: Path) -> bool:
    """Return whether `folder` holds a complete checkpoint."""
    return (_path(folder) / META).is_file()


def check(folder: Path, run: dict[str, Any]) -> TrainingProgress:
    """Return how far the checkpoint in `folder` has come, without reading its tensors.

    Raises:
        DataError: There is no checkpoint, it is damaged, or it belongs to another `run`.
    """
    path = _path(folder)
    if not (path / META).is_file():
        raise DataError(f"{folder}: no checkpoint to resume from; expected one that `medusa-export train` saved")
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
        progress, saved = TrainingProgress(**meta["progress"]), dict(meta["run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if differing := describe_differences(saved, run):
        raise DataError(
            f"{path}: the checkpoint belongs to a run with other arguments or data ({differing}); give the same ones "
            "to resume it, another folder, or --force to train anew"
        )
    return progress


def load(folder: Path, run: dict[str, Any], model: torch.nn.Module, optimiser: Any) -> TrainingProgress:
    """Load the checkpoint in `folder` into the model and its optimizer, and return how far it has come.

    Raises:
        DataError: As `check`, or the tensors do not fit the model.
    """
    progress, path = check(folder, run), _path(folder)
    try:
        tensors = safetensors.torch.load_file(path / STATE)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    for name, parameter in model.named_parameters():
        _fill(parameter, tensors, f"weight.{name}", path)
        optimiser.state[parameter] = {
            "step": torch.tensor(float(progress.step), device=parameter.device if parameter.is_cuda else "cpu"),
            **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
        }
        for moment in MOMENTS:
            _fill(optimiser.state[parameter][moment], tensors, f"{moment}.{name}", path)
    return progress


def remove(folder: Path) -> None:
    """Remove the checkpoint in `folder`, if there is one."""
    for name in (f"{FOLDER}.old", f"{FOLDER}.new", FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)


def _path(folder: Path) -> Path:
    """Return the folder of the checkpoint; a killed run may have left only the one that it was about to rename."""
    return folder / FOLDER if (folder / FOLDER / META).is_file() else folder / f"{FOLDER}.new"


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: the checkpoint is damaged ({reason}); --force trains anew")


@torch.no_grad()
def _fill(target: Tensor, tensors: dict[str, Tensor], name: str, path: Path) -> None:
    if name not in tensors or tensors[name].shape != target.shape:
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        raise _damaged(path, f"{name} is {found}, expected {tuple(target.shape)}")
    target.copy_(tensors[name])
