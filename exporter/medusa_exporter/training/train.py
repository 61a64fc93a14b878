"""Medusa-1: heads learn the frozen decoder's own answers (Medusa paper, arXiv 2401.10774, section 2.2.1)."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from medusa_runtime.errors import UnsupportedModelError

from medusa_exporter.distillation.dataset import DataError, DataSet
from medusa_exporter.heads.modules import Conditioning, MedusaHeads
from medusa_exporter.heads.storage import save_heads
from medusa_exporter.training import checkpoint
from medusa_exporter.training.accuracy import accuracies, measure_hits
from medusa_exporter.training.distributed import WorkerGroup
from medusa_exporter.training.draft_vocabulary import coverage, most_frequent
from medusa_exporter.training.hidden_states import check_model, collect_positions
from medusa_exporter.training.training_loop import Checkpoints, Echo, Schedule, run_training_loop

EVALUATION_SHARE = 0.03  # of --minutes
TRAINING_NAME = "training.json"


@dataclass(frozen=True)
class Settings:
    """How to train.

    heads, layers, conditioning, taps, trunk: see MedusaHeads. draft_vocabulary: how many tokens the heads score, None
    for all. target: the token that came, or the decoder's distribution. epochs: passes over the data, unless minutes
    is set: then the whole run, hidden states and evaluation included, takes about that long. batch: positions a step.
    learning_rate: the highest. decay: the paper's λ, head k weighs λ to the power k. weight_decay: AdamW's, on
    matrices. dropout: see MedusaHeads. hold_out: the share of conversations kept back.
    compiled: try whether a compiled loss is faster; that takes some seconds.
    """

    heads: int = 4
    layers: int = 3
    conditioning: Conditioning = "root"
    taps: tuple[int, ...] = ()
    trunk: int = 0
    draft_vocabulary: int | None = None
    target: Literal["token", "kl"] = "token"
    epochs: float = 2.0
    minutes: float | None = None
    batch: int = 8_192
    learning_rate: float = 1.5e-3
    decay: float = 0.8
    weight_decay: float = 0.3
    dropout: float = 0.1
    seed: int = 0
    hold_out: float = 0.02
    compiled: bool = True


def train(
    model: Any,
    data: DataSet,
    settings: Settings,
    folder: Path,
    *,
    name: str,
    command: str,
    echo: Echo,
    resume: bool = False,
    disk: Path | None = None,
    workers: WorkerGroup | None = None,
) -> MedusaHeads:
    """Train heads on `data`, write them and training.json into `folder`, and return them.

    name: the model's, for config.json. command: for training.json. resume: go on from the checkpoint in `folder`.
    disk: a folder for hidden states that fit no memory. Raises DataError when the data is another model's or leaves
    nothing to train on, CapacityError when the hidden states fit nowhere.
    """
    began, workers = time.monotonic(), workers or WorkerGroup()
    check_model(data, model, name)
    _check_head(model)
    held = data.held_back(settings.hold_out)
    if held.all():
        raise DataError(
            f"all {data.rows} rows are held back; expected some to train on: lower --hold-out or distil more"
        )
    learnt = data.select(~held)
    token_map = None if settings.draft_vocabulary is None else most_frequent(learnt, settings.draft_vocabulary)
    if token_map is not None:
        echo(f"draft vocabulary of {len(token_map)}: {coverage(learnt, token_map.numpy()):.2%} of the answers' tokens")
    run = {
        "settings": asdict(replace(settings, minutes=None, compiled=True)),
        "model": data.facts.digest,
        "data": _digest(data),
    }
    torch.manual_seed(settings.seed)
    heads = MedusaHeads(
        model.config.hidden_size,
        settings.heads,
        settings.layers,
        settings.conditioning,
        token_map=token_map,
        taps=settings.taps,
        trunk=settings.trunk,
        dropout=settings.dropout,
    ).to(model.device)
    found = collect_positions(model, _share(learnt, workers), settings.heads, taps=settings.taps, disk=disk)
    cached = time.monotonic() - began
    echo(f"{len(found):,} positions to train on, states on {found.hidden.device}, {cached:.0f} s")
    deadline = None if settings.minutes is None else began + 60 * settings.minutes * (1 - EVALUATION_SHARE)
    schedule = Schedule(
        settings.epochs,
        deadline,
        settings.batch,
        settings.learning_rate,
        settings.decay,
        settings.weight_decay,
        settings.seed,
        settings.compiled,
    )
    done = run_training_loop(
        heads, model, found, settings.target, schedule, Checkpoints(folder, run, resume), workers, echo
    )
    del found
    heads.requires_grad_(False).eval()
    if not workers.first:
        return heads
    seen = done.step * done.batch
    facts = {
        "command": command,
        "settings": asdict(settings),
        "data": {"rows": data.rows, "answer_tokens": int(data.answer.sum()), **asdict(data.facts)},
        "held_back_rows": int(held.sum()),
        "steps": done.step,
        "positions_seen": seen,
        "positions_per_second": round(seen / done.seconds),
        "seconds": {"hidden_states": round(cached, 1), "training": round(done.seconds, 1)},
        "held_back_accuracy": _evaluate(heads, model, data.select(held), echo) if held.any() else {},
    }
    extras = {"base_model_name_or_path": name, "vocab_size": int(model.config.vocab_size)}
    save_heads(heads, folder, extras, others={TRAINING_NAME: facts})
    checkpoint.remove(folder)
    echo(f"{done.step} steps, {facts['positions_per_second']:,} positions/s, {done.seconds:.0f} s -> {folder}")
    return heads


def _digest(data: DataSet) -> str:
    """Digest of all rows, so that a checkpoint knows its data again."""
    parts = (data.tokens, data.offsets, np.packbits(data.answer))
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


def _share(data: DataSet, workers: WorkerGroup) -> DataSet:
    """The rows of this worker: every count-th one."""
    if workers.count == 1:
        return data
    return data.select(np.arange(data.rows) % workers.count == workers.rank)


def _evaluate(heads: MedusaHeads, model: Any, held: DataSet, echo: Echo) -> dict[str, list[float]]:
    """Return the share of held-back targets within each head's first 1, 5 and 10 ranks."""
    try:
        found = collect_positions(model, held, heads.heads, taps=heads.taps, label="held back")
    except DataError:  # too short to have a target
        return {}
    accuracy = accuracies(measure_hits(heads, model, found))
    for label, values in accuracy.items():
        echo(f"held back, {label}: {' '.join(f'{value:.3f}' for value in values)}")
    return accuracy


def _check_head(model: Any) -> None:
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UnsupportedModelError("the decoder's lm_head has a bias; expected one without: heads cannot share it yet")
