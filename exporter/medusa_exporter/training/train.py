"""Trains Medusa heads on a frozen decoder's own answers: Medusa-1 (arXiv 2401.10774, section 2.2.1)."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from medusa_runtime.errors import UnsupportedModelError

from medusa_exporter.distillation.dataset import DataError, DataSet
from medusa_exporter.heads.base_model import BASE_KEY, BASE_REVISION_KEY
from medusa_exporter.heads.modules import Conditioning, MedusaHeads
from medusa_exporter.heads.storage import load_heads, save_heads
from medusa_exporter.training import checkpoint
from medusa_exporter.training.accuracy import accuracies, measure_hits
from medusa_exporter.training.distributed import WorkerGroup
from medusa_exporter.training.draft_vocabulary import coverage, most_frequent
from medusa_exporter.training.hidden_states import check_model, collect_positions
from medusa_exporter.training.resume import TRAINING_NAME, describe_run, find_earlier_run
from medusa_exporter.training.training_loop import Checkpoints, Report, Schedule, run_training_loop

EVALUATION_SHARE = 0.03  # of --minutes


@dataclass(frozen=True)
class Settings:
    """How heads are trained.

    Attributes:
        heads: Number of heads, K.
        layers: ResBlocks per head.
        conditioning: What the heads read in addition to the hidden state, see `MedusaHeads`.
        taps: Decoder layers whose normalised input the heads read too.
        trunk: Width of the gated block that all heads share, 0 for none.
        draft_vocabulary: How many tokens the heads score, `None` for the whole vocabulary.
        target: "token" trains on the token that followed, "kl" on the decoder's distribution.
        epochs: Passes over the data, ignored if `minutes` is set.
        minutes: Duration of the whole run, hidden states and evaluation included.
        batch: Positions per step, over all processes.
        learning_rate: The highest learning rate of the schedule.
        decay: λ of the paper: the loss of head k is weighted with λ to the power k.
        weight_decay: Weight decay of AdamW, applied to matrices.
        dropout: Dropout probability inside the heads.
        seed: Seed of initial weights, order and dropout.
        hold_out: Share of conversations that are held out for evaluation.
        compiled: Try whether a compiled loss is faster, which takes some seconds.
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
    report: Report,
    revision: str | None = None,
    force: bool = False,
    disk: Path | None = None,
    workers: WorkerGroup | None = None,
) -> MedusaHeads:
    """Train heads on `data` and write them and training.json into `folder`.

    A run that was interrupted is resumed from its checkpoint; heads that the same run has finished are loaded.

    Args:
        model: The decoder, which stays as it is.
        data: The data set that `distill` made with this decoder.
        settings: The training settings.
        folder: The output folder, which holds the checkpoint meanwhile.
        name: The model's name, for config.json.
        command: The command line, for training.json.
        report: Called with each line of progress.
        revision: Branch, tag or commit of the model on the hub, for config.json.
        force: Train anew, whatever an earlier run left in `folder`.
        disk: A folder for hidden states that fit no memory.
        workers: The processes that train together, `None` for this one alone.

    Returns:
        The trained heads, in evaluation mode.

    Raises:
        DataError: The data belongs to another model or leaves nothing to train on, or `folder` holds the work of
            another run.
        CapacityError: The hidden states fit nowhere.
    """
    began, workers = time.monotonic(), workers or WorkerGroup()
    check_model(data, model, name)
    _check_lm_head(model)
    run = describe_run(settings, data, name=name, revision=revision, dtype=model.dtype, workers=workers.count)
    earlier = "none" if force else find_earlier_run(folder, run)
    if earlier == "finished":
        report(f"{folder} is up to date; --force trains anew")
        return load_heads(folder, model.config.hidden_size, int(model.config.vocab_size)).to(model.device)
    if force and workers.is_main:
        checkpoint.remove(folder)
    held_out = data.held_out(settings.hold_out)
    if held_out.all():
        raise DataError(
            f"all {data.rows} conversations are held out; expected some to train on: lower --hold-out or distill more"
        )
    training_rows = data.select(~held_out)
    heads = _new_heads(model, training_rows, settings, report)
    positions = collect_positions(
        model, _rows_of_worker(training_rows, workers), settings.heads, taps=settings.taps, disk=disk
    )
    cached = time.monotonic() - began
    report(
        f"{len(positions):,} positions to train on; their hidden states were computed in {cached:.0f} s and are "
        f"stored on {positions.hidden.device}"
    )
    checkpoints = Checkpoints(folder, run, resume=earlier == "interrupted")
    done = run_training_loop(
        heads, model, positions, settings.target, _schedule(settings, began), checkpoints, workers, report
    )
    del positions
    heads.requires_grad_(False).eval()
    if not workers.is_main:
        return heads
    seen = done.step * done.batch
    record = {
        "command": command,
        "settings": asdict(settings),
        "data": {"rows": data.rows, "answer_tokens": int(data.answer.sum()), **asdict(data.facts)},
        "run": run,
        "held_back_rows": int(held_out.sum()),
        "steps": done.step,
        "positions_seen": seen,
        "positions_per_second": round(seen / done.seconds),
        "seconds": {"hidden_states": round(cached, 1), "training": round(done.seconds, 1)},
        "held_back_accuracy": _evaluate(heads, model, data.select(held_out), report) if held_out.any() else {},
    }
    base = {BASE_KEY: name, **({BASE_REVISION_KEY: revision} if revision else {})}
    save_heads(heads, folder, {**base, "vocab_size": int(model.config.vocab_size)}, others={TRAINING_NAME: record})
    checkpoint.remove(folder)
    report(f"{done.step} steps, {record['positions_per_second']:,} positions/s, {done.seconds:.0f} s -> {folder}")
    return heads


def _new_heads(model: Any, rows: DataSet, settings: Settings, report: Report) -> MedusaHeads:
    """Create untrained heads; a draft vocabulary has the most frequent tokens of `rows`."""
    token_map = None
    if settings.draft_vocabulary is not None:
        token_map = most_frequent(rows, settings.draft_vocabulary)
        share = coverage(rows, token_map.numpy())
        report(
            f"draft vocabulary of {len(token_map):,} tokens: {share:.2%} of the tokens in the answers are among them"
        )
    torch.manual_seed(settings.seed)
    heads: MedusaHeads = MedusaHeads(
        model.config.hidden_size,
        settings.heads,
        settings.layers,
        settings.conditioning,
        token_map=token_map,
        taps=settings.taps,
        trunk=settings.trunk,
        dropout=settings.dropout,
    ).to(model.device)
    return heads


def _schedule(settings: Settings, began: float) -> Schedule:
    """Return the schedule of a run that began at `began`; a part of its minutes is left for the evaluation."""
    deadline = None if settings.minutes is None else began + 60 * settings.minutes * (1 - EVALUATION_SHARE)
    return Schedule(
        settings.epochs,
        deadline,
        settings.batch,
        settings.learning_rate,
        settings.decay,
        settings.weight_decay,
        settings.seed,
        settings.compiled,
    )


def _rows_of_worker(data: DataSet, workers: WorkerGroup) -> DataSet:
    """Select the rows of this process: of four processes, process 1 trains on rows 1, 5, 9 and so on."""
    if workers.count == 1:
        return data
    return data.select(np.arange(data.rows) % workers.count == workers.rank)


def _evaluate(heads: MedusaHeads, model: Any, held_out: DataSet, report: Report) -> dict[str, list[float]]:
    """Return the share of held-out targets within each head's first 1, 5 and 10 ranks."""
    try:
        positions = collect_positions(model, held_out, heads.heads, taps=heads.taps, label="held out")
    except DataError:  # the rows are too short to have a target
        return {}
    accuracy = accuracies(measure_hits(heads, model, positions))
    for label, values in accuracy.items():
        shares = " ".join(f"{value:.3f}" for value in values)
        report(f"accuracy of each head on held-out conversations, {label.replace('top', 'top-')}: {shares}")
    return accuracy


def _check_lm_head(model: Any) -> None:
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UnsupportedModelError(
            "the decoder's lm_head has a bias; expected one without, because heads cannot share it yet: train heads "
            "for another model"
        )
