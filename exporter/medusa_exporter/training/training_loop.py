"""The training loop: AdamW, a learning rate with warm-up and cosine decay, and checkpoints that resume exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.training import checkpoint, losses
from medusa_exporter.training.checkpoint import TrainingProgress
from medusa_exporter.training.distributed import WorkerGroup
from medusa_exporter.training.draft_vocabulary import draft_lm_head
from medusa_exporter.training.hidden_states import Positions
from medusa_exporter.training.losses import Loss, Targets
from medusa_exporter.training.state_storage import gather_rows

PROBE_STEPS = 20  # after which the rate is known
SKIPPED_STEPS = 5  # of these, the slow first ones, which are not timed
ASSUMED_STEPS = 1_000  # length of the schedule until the rate is known
STEPS_PER_LINE = 200
SECONDS_PER_LINE = 10.0  # where 200 steps take longer than that
CHECKPOINT_SECONDS = 60.0

Report = Callable[[str], None]


@dataclass(frozen=True)
class Schedule:
    """How long training takes and how fast it learns.

    Attributes:
        epochs: Passes over the data, if there is no deadline.
        deadline: A `time.monotonic()` at which training is to end, or `None`.
        batch: Positions per step, over all processes.
        learning_rate: The highest learning rate.
        decay: The loss of head k is weighted with `decay ** k`.
        weight_decay: Weight decay of AdamW.
        seed: Seed of order and dropout.
        compiled: Try whether a compiled loss is faster.
    """

    epochs: float
    deadline: float | None
    batch: int
    learning_rate: float
    decay: float
    weight_decay: float
    seed: int
    compiled: bool


@dataclass(frozen=True)
class Checkpoints:
    """Where checkpoints are saved, the run that they belong to, and whether training resumes from one."""

    folder: Path
    run: dict[str, Any]
    resume: bool = False


def learning_rate(step: int, total: int, highest: float) -> float:
    """Return the learning rate of a step: it rises linearly over the first 2% of steps, then follows a cosine to 0."""
    warm_up = max(1, round(0.02 * total))
    if step < warm_up:
        return highest * (step + 1) / warm_up
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


def run_training_loop(
    heads: MedusaHeads,
    model: Any,
    found: Positions,
    target: str,
    schedule: Schedule,
    checkpoints: Checkpoints,
    workers: WorkerGroup,
    report: Report,
) -> TrainingProgress:
    """Train `heads` on the positions of this process to the end of the schedule, and return how far it came.

    Args:
        heads: The heads, whose parameters are changed.
        model: The decoder, of which the embedding and the lm_head are used.
        found: The training positions of this process.
        target: "token" or "kl", see `losses`.
        schedule: Duration and learning rate.
        checkpoints: Where checkpoints are saved, and whether training resumes from one.
        workers: The processes that train together.
        report: Called with each line of progress.

    Raises:
        DataError: The checkpoint is damaged or belongs to another run.
    """
    device, width = found.root.device, workers.count
    fewest = int(workers.minimum(torch.tensor(len(found), device=device)))
    batch = min(max(1, schedule.batch // width), fewest)
    per_epoch = fewest // batch
    optimiser = torch.optim.AdamW(
        _groups(heads, schedule.weight_decay), lr=0.0, betas=(0.9, 0.95), fused=device.type == "cuda"
    )
    embedding, lm_head = model.get_input_embeddings(), draft_lm_head(model, heads).to(found.hidden.dtype)
    targets = _targets(heads, model, found, target)
    loss = _loss(target, targets, lm_head, batch, found, report, compiled=schedule.compiled)
    done = TrainingProgress(
        0, 0 if schedule.deadline else max(1, round(schedule.epochs * per_epoch)), batch * width, 0.0
    )
    if checkpoints.resume:
        done = checkpoint.load(checkpoints.folder, checkpoints.run, heads, optimiser)
        report(f"resuming at step {done.step} of {done.total}")
    rate = _Rate(schedule.deadline)
    started = saved = shown = time.monotonic()
    before, order, epoch = done.seconds, torch.empty(0, dtype=torch.int64), -1
    while not done.total or done.step < done.total:
        if done.step // per_epoch != epoch:
            epoch = done.step // per_epoch
            order = _order(len(found), schedule.seed, epoch, workers.rank, device)
        place = done.step % per_epoch * batch
        chosen = order[place : place + batch]
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(done.step, done.total or ASSUMED_STEPS, schedule.learning_rate)
        inputs = gather_rows(found.hidden, chosen), embedding(found.root[chosen])
        wanted = [targets(head, chosen) for head in range(heads.heads)]
        torch.manual_seed(_seed(schedule.seed, done.step, workers.rank))  # a resumed run repeats its dropout masks
        values = losses.step_gradients(heads, inputs, lm_head, wanted, loss, schedule.decay)
        if workers.count > 1:
            for parameter in heads.parameters():
                if parameter.grad is not None:
                    parameter.grad.copy_(workers.mean(parameter.grad))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        done = replace(done, step=done.step + 1)
        if not done.total and (steps := rate.steps_in_all(done.step, values)):
            done = replace(done, total=int(workers.minimum(torch.tensor(steps, device=device))))
            each = rate.seconds_per_step
            report(
                f"{done.total} steps at {done.batch / each:,.0f} positions/s, {done.total / per_epoch:.1f} epochs of "
                f"{per_epoch * done.batch:,} positions"
            )
        now = time.monotonic()
        if done.step % STEPS_PER_LINE == 0 or done.step == done.total or now - shown > SECONDS_PER_LINE:
            shown = now
            line = " ".join(f"{value:.3f}" for value in values.tolist())
            report(f"step {done.step}/{done.total or '?'}  loss per head {line}")
        if workers.is_main and done.total and now - saved > CHECKPOINT_SECONDS:
            saved = now
            so_far = replace(done, seconds=before + now - started)
            checkpoint.save(checkpoints.folder, so_far, checkpoints.run, heads, optimiser)
    return replace(done, seconds=before + time.monotonic() - started)


class _Rate:
    """Measures how long a step takes, and so how many steps fit before the deadline."""

    def __init__(self, deadline: float | None) -> None:
        self._deadline, self._start, self.seconds_per_step = deadline, 0.0, 0.0

    def steps_in_all(self, step: int, values: Tensor) -> int:
        """Return the number of steps until the deadline, or 0 while it is not known yet."""
        if self._deadline is None or step not in (SKIPPED_STEPS, PROBE_STEPS):
            return 0
        now = synchronised_time(values)
        if step == SKIPPED_STEPS:
            self._start = now
            return 0
        self.seconds_per_step = max(1e-6, (now - self._start) / (PROBE_STEPS - SKIPPED_STEPS))
        return step + max(0, int((self._deadline - now) / self.seconds_per_step))


def synchronised_time(tensor: Tensor) -> float:
    """Wait until the device has computed `tensor`, and return the time."""
    tensor.sum().item()
    return time.monotonic()


def _order(count: int, seed: int, epoch: int, rank: int, device: torch.device) -> Tensor:
    """Return the order of positions (count,) int64 in an epoch, which depends on nothing but the arguments."""
    generator = torch.Generator(device=device).manual_seed(_seed(seed, epoch, rank))
    return torch.randperm(count, generator=generator, device=device)


def _seed(seed: int, index: int, rank: int) -> int:
    return seed * 1_000_003 + index * 1_009 + rank


def _groups(heads: MedusaHeads, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameter groups of AdamW: weight decay applies to matrices, not to biases."""
    biases = list(heads.biases)
    matrices = [p for p in heads.parameters() if not any(p is bias for bias in biases)]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}]


def _targets(heads: MedusaHeads, model: Any, found: Positions, target: str) -> Targets:
    if target == "kl":
        return losses.kl_targets(heads, found)
    return losses.token_targets(heads, found, int(model.config.vocab_size))


def _loss(
    target: str, targets: Targets, lm_head: Tensor, batch: int, found: Positions, report: Report, *, compiled: bool
) -> Loss:
    """Return the loss, compiled if that is faster on this GPU; if compiling fails, the eager loss serves."""
    eager: Loss = losses.kl_loss if target == "kl" else losses.token_loss
    if found.root.device.type != "cuda" or not compiled:
        return eager
    features = torch.randn(batch, lm_head.shape[1], device=lm_head.device, dtype=lm_head.dtype)
    example = targets(0, torch.arange(batch, device=found.root.device))

    def seconds(loss: Loss) -> float:
        for timed in (False, False, True):
            start = time.monotonic()
            for _ in range(5 if timed else 1):
                leaf = features.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(loss(leaf, lm_head, *example), leaf)
            end = synchronised_time(gradient)
        return (end - start) / 5

    plain = seconds(eager)
    try:
        fused: Loss = torch.compile(eager, dynamic=False)
        taken = seconds(fused)
    except Exception as error:  # the compiler may lack something on this machine; training does not need it
        report(f"loss: not compiled ({type(error).__name__})")
        return eager
    report(f"loss of one head: {plain * 1e3:.2f} ms, compiled {taken * 1e3:.2f} ms")
    return fused if taken < plain else eager
