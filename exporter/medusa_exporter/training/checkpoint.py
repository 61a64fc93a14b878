"""Training that was broken off: weights, optimiser and step in safetensors and JSON, never a pickle."""

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

STATE, META = "state.safetensors", "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


@dataclass(frozen=True)
class Progress:
    """How far training is: steps done, steps in all, positions a step, seconds spent on steps."""

    step: int
    total: int
    batch: int
    seconds: float


def save(folder: Path, progress: Progress, run: dict[str, Any], model: torch.nn.Module, optimiser: Any) -> None:
    """Replace the checkpoint in `folder`; `run` says what is being trained, on what and how."""
    tensors = {f"weight.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = optimiser.state[parameter][moment]
    new, place, old = (folder / f"{FOLDER}{suffix}" for suffix in (".new", "", ".old"))
    if (new / META).is_file() and not place.exists():  # a killed run's, all that there is
        new.rename(place)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    safetensors.torch.save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, new / STATE)
    write_json(new / META, {"progress": progress.__dict__, "run": run})  # what has it is whole
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, run: dict[str, Any], model: torch.nn.Module, optimiser: Any) -> Progress:
    """Put the checkpoint in `folder` back into model and optimiser and return how far it was.

    Raises DataError when there is none, when it is damaged, or when it was made by another `run`.
    """
    path = folder / FOLDER if (folder / FOLDER / META).is_file() else folder / f"{FOLDER}.new"
    if not (path / META).is_file():
        raise DataError(f"{folder}: no checkpoint to resume from; train without --resume")
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
        progress = Progress(**meta["progress"])
        tensors = safetensors.torch.load_file(path / STATE)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise DataError(f"{path}: damaged checkpoint ({type(error).__name__}: {error}); train anew") from error
    wanted = json.loads(json.dumps(run))
    if differing := sorted(key for key in wanted | meta["run"] if wanted.get(key) != meta["run"].get(key)):
        raise DataError(
            f"{path}: the checkpoint was made with another {', '.join(differing)}; resume with the same arguments and "
            "data, or train anew without --resume"
        )
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
    """Remove the checkpoint of a training that has ended."""
    for name in (FOLDER, f"{FOLDER}.new", f"{FOLDER}.old"):
        shutil.rmtree(folder / name, ignore_errors=True)


@torch.no_grad()
def _fill(target: Tensor, tensors: dict[str, Tensor], name: str, path: Path) -> None:
    if name not in tensors or tensors[name].shape != target.shape:
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        raise DataError(f"{path}: {name} is {found}, expected {tuple(target.shape)}; damaged, train anew")
    target.copy_(tensors[name])
