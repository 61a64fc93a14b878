"""Medusa-1: heads learn the frozen decoder's own answers (Medusa paper, arXiv 2401.10774, section 2.2.1)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from medusa_runtime.errors import UnsupportedModelError
from torch import Tensor
from torch.nn import functional as F

from medusa_exporter.heads.accuracy import measure_hits, top_accuracy
from medusa_exporter.heads.backbone import IGNORED, Positions, check_model, positions
from medusa_exporter.heads.data import DataError, DataSet
from medusa_exporter.heads.layout import save_heads
from medusa_exporter.heads.modules import Conditioning, MedusaHeads

DECAY = 0.8  # the paper's λ: head k weighs λ to the power k
PROBE_STEPS = 20  # after which the rate is known
SKIPPED_STEPS = 5  # of these, the first ones, which are slow
ASSUMED_STEPS = 1_000  # the length that warm-up takes for granted until then
EVALUATION_SHARE = 0.03  # of --minutes
STEPS_PER_LINE = 200
TRAINING_NAME = "training.json"

Echo = Callable[[str], None]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """How to train.

    heads, layers, conditioning: see MedusaHeads. epochs: passes over the data, unless minutes is set: then the whole
    run, hidden states and evaluation included, takes about that long. batch: positions a step. learning_rate: the
    highest. hold_out: the share of conversations kept back.
    """

    heads: int = 4
    layers: int = 3
    conditioning: Conditioning = "root"
    epochs: float = 2.0
    minutes: float | None = None
    batch: int = 8_192
    learning_rate: float = 1.5e-3
    seed: int = 0
    hold_out: float = 0.02


def learning_rate(step: int, total: int, highest: float) -> float:
    """Rise linearly over the first 2% of `total` steps, then fall to zero along a cosine."""
    warm_up = max(1, round(0.02 * total))
    if step < warm_up:
        return highest * (step + 1) / warm_up
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


def head_loss(features: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies of one head: features (n, H), lm_head (V, H), targets (n,) int64 or IGNORED."""
    return F.cross_entropy(F.linear(features, lm_head), targets, ignore_index=IGNORED, reduction="sum")


def step_gradients(heads: MedusaHeads, parts: tuple[Tensor, Tensor, Tensor], lm_head: Tensor, loss: Loss) -> Tensor:
    """Add the gradients of one batch to the heads' parameters; return each head's mean loss (K,).

    parts: hidden (n, H), the root's embedding (n, H), targets (n, K). Head by head, so that one head's logits (n, V)
    are in memory at a time.
    """
    hidden, root, targets = parts
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=hidden.dtype == torch.bfloat16):
        features = heads.features(hidden, root)  # (K, n, H)
    leaves = features.detach().to(hidden.dtype)
    gradients, losses = torch.empty_like(features), []
    for k in range(heads.heads):
        leaf = leaves[k].requires_grad_()
        target = targets[:, k].long()
        total = loss(leaf, lm_head, target)
        (gradient,) = torch.autograd.grad(total, leaf)
        count = (target != IGNORED).sum().clamp(min=1)
        gradients[k] = gradient * (DECAY**k / count)
        losses.append(total.detach().float() / count)
    torch.autograd.backward(features, gradients)
    return torch.stack(losses)


def train(
    model: Any, data: DataSet, settings: Settings, folder: Path, *, name: str, command: str, echo: Echo
) -> MedusaHeads:
    """Train heads on `data`, write them and training.json into `folder`, and return them.

    name: the model's, for config.json. command: for training.json. Raises DataError when the data is another model's
    or leaves nothing to train on.
    """
    began = time.monotonic()
    check_model(data, model, name)
    _check_head(model)
    held = data.held_back(settings.hold_out)
    if held.all():
        raise DataError(
            f"all {data.rows} rows are held back; expected some to train on: lower --hold-out or distil more"
        )
    torch.manual_seed(settings.seed)
    found = positions(model, data.select(~held), settings.heads)
    cached = time.monotonic() - began
    echo(f"{len(found):,} positions to train on, {cached:.0f} s")
    heads = MedusaHeads(model.config.hidden_size, settings.heads, settings.layers, settings.conditioning)
    heads.to(model.device)
    deadline = None if settings.minutes is None else began + 60 * settings.minutes * (1 - EVALUATION_SHARE)
    start = time.monotonic()
    steps, batch = _optimise(heads, model, found, settings, deadline, echo)
    seconds = time.monotonic() - start
    del found
    accuracy = _evaluate(heads, model, data.select(held), echo) if held.any() else {}
    facts = {
        "command": command,
        "settings": asdict(settings),
        "data": {"rows": data.rows, "answer_tokens": int(data.answer.sum()), **asdict(data.facts)},
        "held_back_rows": int(held.sum()),
        "steps": steps,
        "positions_seen": steps * batch,
        "positions_per_second": round(steps * batch / seconds),
        "seconds": {"hidden_states": round(cached, 1), "training": round(seconds, 1)},
        "held_back_accuracy": accuracy,
    }
    save_heads(heads, folder, {"base_model_name_or_path": name, "vocab_size": int(model.config.vocab_size)})
    (folder / TRAINING_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    echo(f"{steps} steps, {facts['positions_per_second']:,} positions/s, {seconds:.0f} s -> {folder}")
    return heads.requires_grad_(False).eval()


def _optimise(
    heads: MedusaHeads, model: Any, found: Positions, settings: Settings, deadline: float | None, echo: Echo
) -> tuple[int, int]:
    """Run AdamW to the end of the epochs or to `deadline`; return the number of steps and the batch used."""
    cuda = found.hidden.is_cuda
    optimiser = torch.optim.AdamW(heads.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=cuda)
    embedding, lm_head = model.get_input_embeddings(), model.get_output_embeddings().weight.detach()
    batch = min(settings.batch, len(found))
    loss = _fastest_loss(found.hidden[:batch], lm_head, found.targets[:batch, 0].long(), echo) if cuda else head_loss
    total = max(1, round(settings.epochs * len(found) / batch)) if deadline is None else None
    order = torch.empty(0, dtype=torch.int64, device=found.hidden.device)
    step, probe_start = 0, 0.0
    while total is None or step < total:
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(found), device=order.device)])
        chosen, order = order[:batch], order[batch:]
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, total or ASSUMED_STEPS, settings.learning_rate)
        root = embedding(found.root[chosen])
        losses = step_gradients(heads, (found.hidden[chosen], root, found.targets[chosen]), lm_head, loss)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        if deadline is not None and total is None and step in (SKIPPED_STEPS, PROBE_STEPS):
            now = _synchronised_time(losses)
            if step == PROBE_STEPS:
                each = (now - probe_start) / (PROBE_STEPS - SKIPPED_STEPS)
                total = step + max(0, int((deadline - now) / each))
                echo(f"{total} steps at {batch / each:,.0f} positions/s, {total * batch / len(found):.1f} epochs")
            probe_start = now
        if step % STEPS_PER_LINE == 0 or step == total:
            echo(f"step {step}/{total}  loss per head {' '.join(f'{value:.3f}' for value in losses.tolist())}")
    return step, batch


def _synchronised_time(tensor: Tensor) -> float:
    """Wait for `tensor` and return the time."""
    tensor.sum().item()
    return time.monotonic()


def _fastest_loss(features: Tensor, lm_head: Tensor, targets: Tensor, echo: Echo) -> Loss:
    """Return `head_loss` or its compiled form, whichever is faster on one batch; compiling may fail, eager cannot."""

    def seconds(loss: Loss) -> float:
        for timed in (False, False, True):
            start = time.monotonic()
            for _ in range(5 if timed else 1):
                leaf = features.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(loss(leaf, lm_head, targets), leaf)
            end = _synchronised_time(gradient)
        return end - start

    eager = seconds(head_loss)
    try:
        compiled: Loss = torch.compile(head_loss, dynamic=False)
        fused = seconds(compiled)
    except Exception as error:  # whatever the compiler lacks on this machine, training goes on
        echo(f"loss: not compiled ({type(error).__name__})")
        return head_loss
    echo(f"loss of one head: {eager / 5 * 1e3:.2f} ms, compiled {fused / 5 * 1e3:.2f} ms")
    return compiled if fused < eager else head_loss


def _evaluate(heads: MedusaHeads, model: Any, held: DataSet, echo: Echo) -> dict[str, list[float]]:
    """Return the share of held-back targets within each head's first 1, 5 and 10 ranks."""
    try:
        found = positions(model, held, heads.heads, "held back")
    except DataError:  # too short to have a target
        return {}
    hits = measure_hits(heads, model, found)
    accuracy = {f"top{ranks}": top_accuracy(hits, ranks) for ranks in (1, 5, 10)}
    for label, values in accuracy.items():
        echo(f"held back, {label}: {' '.join(f'{value:.3f}' for value in values)}")
    return accuracy


def _check_head(model: Any) -> None:
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UnsupportedModelError("the decoder's lm_head has a bias; expected one without: heads cannot share it yet")
