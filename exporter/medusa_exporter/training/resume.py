"""What a training run finds in its output folder: nothing, an interrupted run to resume, or finished heads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medusa_exporter.distillation.dataset import DataError, DataSet
from medusa_exporter.heads.files import CONFIG_NAME, WEIGHTS_NAME
from medusa_exporter.resume import describe_differences
from medusa_exporter.training import checkpoint

if TYPE_CHECKING:
    import torch

    from medusa_exporter.training.train import Settings

TRAINING_NAME = "training.json"
REMEDY = "give the same arguments and data, another folder, or --force to train anew"

EarlierRun = Literal["none", "interrupted", "finished"]


def describe_run(
    settings: Settings, data: DataSet, *, name: str, revision: str | None, dtype: torch.dtype, workers: int
) -> dict[str, Any]:
    """Return everything that decides which heads a run trains, in JSON's terms.

    Args:
        settings: The training settings.
        data: The data set before rows are held out.
        name: The model's name.
        revision: Branch, tag or commit of the model on the hub, `None` for its default.
        dtype: Type of the decoder's weights and hidden states.
        workers: How many processes train together.
    """
    decisive = {key: value for key, value in asdict(settings).items() if key != "compiled"}  # compiling changes no step
    return {
        "model": name,
        "revision": revision,
        "model_digest": data.facts.digest,
        "data": _digest(data),
        "dtype": str(dtype),
        "workers": workers,
        "settings": decisive,
    }


def find_earlier_run(folder: Path, run: dict[str, Any]) -> EarlierRun:
    """Find out what an earlier run left in `folder`.

    Raises:
        DataError: The folder holds a checkpoint or finished heads of a run that differs from `run`, or a damaged
            checkpoint.
    """
    if checkpoint.exists(folder):
        checkpoint.check(folder, run)
        return "interrupted"
    record = folder / TRAINING_NAME
    if not all((folder / name).is_file() for name in (TRAINING_NAME, WEIGHTS_NAME, CONFIG_NAME)):
        return "none"
    try:
        finished = json.loads(record.read_text(encoding="utf-8")).get("run", {})
    except (ValueError, AttributeError) as error:
        raise DataError(f"{record}: not valid JSON ({error}); {REMEDY}") from error
    if differing := describe_differences(finished, run):
        raise DataError(f"{folder}: holds heads that were trained otherwise ({differing}); {REMEDY}")
    return "finished"


def _digest(data: DataSet) -> str:
    """Hash all rows, so that a checkpoint can be matched with its data."""
    parts = (data.tokens, data.offsets, np.packbits(data.answer))
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()
