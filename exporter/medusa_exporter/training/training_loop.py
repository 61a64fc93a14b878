"""The training loop: AdamW, warm-up and cosine, checkpoints that continue exactly."""

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
from medusa_exporter.training.checkpoint import Progress
from medusa_exporter.training.distributed import WorkerGroup
from medusa_exporter.training.draft_vocabulary import draft_lm_head
from medusa_exporter.training.hidden_states import Positions
from medusa_exporter.training.losses import Loss, Targets
from medusa_exporter.training.state_storage import gather_rows

PROBE_STEPS = 20  # after which the rate is known
SKIPPED_STEPS = 5  # of these, the first ones, which are slow
ASSUMED_STEPS = 1_000  # the length that warm-up takes for granted until then
STEPS_PER_LINE = 200
CHECKPOINT_SECONDS = 60.0

Echo = Callable[[str], None]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: epochs, or until `deadline` (time.monotonic()); positions a step over all workers."""

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
    """Where they go, what `run` they belong to, and whether to begin with the one that lies there."""

    folder: Path
    run: dict[str, Any]
    resume: bool = False


def learning_rate(step: int, total: int, highest: float) -> float:
    """Rise linearly over the first 2% of `total` steps, then fall to zero along a cosine."""
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
    echo: Echo,
) -> Progress:
    """Train `heads` on this worker's positions to the end of the schedule; return how far it came.

    target: "token" or "kl". Raises DataError when there is no checkpoint to resume from, or one of another run.
    """
    device, width = found.root.device, workers.count
    least = int(workers.least(torch.tensor(len(found), device=device)))
    batch = min(max(1, schedule.batch // width), least)
    per_epoch = least // batch
    optimiser = torch.optim.AdamW(
        _groups(heads, schedule.weight_decay), lr=0.0, betas=(0.9, 0.95), fused=device.type == "cuda"
    )
    embedding, lm_head = model.get_input_embeddings(), draft_lm_head(model, heads).to(found.hidden.dtype)
    targets = _targets(heads, model, found, target)
    loss = _loss(target, targets, lm_head, batch, found, echo, compiled=schedule.compiled)
    done = Progress(0, 0 if schedule.deadline else max(1, round(schedule.epochs * per_epoch)), batch * width, 0.0)
    if checkpoints.resume:
        done = checkpoint.load(checkpoints.folder, checkpoints.run, heads, optimiser)
        echo(f"goes on at step {done.step} of {done.total}")
    rate = _Rate(schedule.deadline)
    started = saved = time.monotonic()
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
        torch.manual_seed(_seed(schedule.seed, done.step, workers.rank))  # what dropout leaves out, resumed or not
        values = losses.step_gradients(heads, inputs, lm_head, wanted, loss, schedule.decay)
        if workers.count > 1:
            for parameter in heads.parameters():
                if parameter.grad is not None:
                    parameter.grad.copy_(workers.mean(parameter.grad))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        done = replace(done, step=done.step + 1)
        if not done.total and (steps := rate.steps_in_all(done.step, values)):
            done = replace(done, total=int(workers.least(torch.tensor(steps, device=device))))
            each = rate.seconds_per_step
            echo(
                f"{done.total} steps at {done.batch / each:,.0f} positions/s, {done.total / per_epoch:.1f} epochs of "
                f"{per_epoch * done.batch:,} positions"
            )
        if done.step % STEPS_PER_LINE == 0 or done.step == done.total:
            line = " ".join(f"{value:.3f}" for value in values.tolist())
            echo(f"step {done.step}/{done.total or '?'}  loss per head {line}")
            if workers.first and done.total and time.monotonic() - saved > CHECKPOINT_SECONDS:
                saved = time.monotonic()
                now = replace(done, seconds=before + saved - started)
                checkpoint.save(checkpoints.folder, now, checkpoints.run, heads, optimiser)
    return replace(done, seconds=before + time.monotonic() - started)


class _Rate:
    """Finds out how long a step takes, and so how many there is time for."""

    def __init__(self, deadline: float | None) -> None:
        self._deadline, self._start, self.seconds_per_step = deadline, 0.0, 0.0

    def steps_in_all(self, step: int, values: Tensor) -> int:
        """The number of steps until the deadline, once it is known; 0 before."""
        if self._deadline is None or step not in (SKIPPED_STEPS, PROBE_STEPS):
            return 0
        now = synchronised_time(values)
        if step == SKIPPED_STEPS:
            self._start = now
            return 0
        self.seconds_per_step = max(1e-6, (now - self._start) / (PROBE_STEPS - SKIPPED_STEPS))
        return step + max(0, int((self._deadline - now) / self.seconds_per_step))


def synchronised_time(tensor: Tensor) -> float:
    """Wait for `tensor` and return the time."""
    tensor.sum().item()
    return time.monotonic()


def _order(count: int, seed: int, epoch: int, rank: int, device: torch.device) -> Tensor:
    """The order of one epoch, the same whenever it is asked for: (count,) int64."""
    generator = torch.Generator(device=device).manual_seed(_seed(seed, epoch, rank))
    return torch.randperm(count, generator=generator, device=device)


def _seed(seed: int, index: int, rank: int) -> int:
    return seed * 1_000_003 + index * 1_009 + rank


def _groups(heads: MedusaHeads, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay, biases do not."""
    biases = list(heads.biases)
    matrices = [p for p in heads.parameters() if not any(p is bias for bias in biases)]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}]


def _targets(heads: MedusaHeads, model: Any, found: Positions, target: str) -> Targets:
    if target == "kl":
        return losses.kl_targets(heads, found)
    return losses.token_targets(heads, found, int(model.config.vocab_size))


def _loss(
    target: str, targets: Targets, lm_head: Tensor, batch: int, found: Positions, echo: Echo, *, compiled: bool
) -> Loss:
    """Return the loss, or on a GPU its compiled form where that is faster; compiling may fail, eager cannot."""
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
    except Exception as error:  # whatever the compiler lacks on this machine, training goes on
        echo(f"loss: not compiled ({type(error).__name__})")
        return eager
    echo(f"loss of one head: {plain * 1e3:.2f} ms, compiled {taken * 1e3:.2f} ms")
    return fused if taken < plain else eager
