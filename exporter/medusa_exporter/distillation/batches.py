"""Generates conversations batch by batch: each batch has its own seed and is saved when it is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from medusa_runtime.errors import CapacityError

from medusa_exporter.console import Progress
from medusa_exporter.distillation.checkpoint import is_saved, save_batch
from medusa_exporter.distillation.scripts import ANSWER, Request, RowGenerator, Script


@dataclass(frozen=True)
class Throughput:
    """How many answer tokens were generated, before cleaning, and in how many seconds."""

    answer_tokens: int
    seconds: float


def split_batches(requests: Sequence[Request], size: int) -> list[Sequence[Request]]:
    """Split requests into batches of `size`; the last one may be smaller."""
    return [requests[start : start + size] for start in range(0, len(requests), size)]


def generate_batches(
    batches: Sequence[Sequence[Request]],
    generator: RowGenerator,
    scripts: Callable[[Sequence[Request]], list[Script]],
    partial: Path,
    *,
    context: int,
    seed: int,
    until: float,
) -> Throughput:
    """Generate the batches that are not saved in `partial` yet, and save them there.

    Args:
        batches: All batches of the run, in order.
        generator: Generates the rows of a batch.
        scripts: Makes the scripts of a batch.
        partial: The folder of finished batches.
        context: Maximum number of tokens of a row.
        seed: Seed of the run.
        until: A `time.monotonic()` after which no batch is started, nor one that would end later if it took as long as
            the one before.

    Returns:
        The throughput of this run, without the batches that were there.

    Raises:
        CapacityError: A batch does not fit the device's memory.
    """
    answers, began, last = 0, time.monotonic(), 0.0
    left = sum(len(batch) for number, batch in enumerate(batches) if not is_saved(partial, number))
    with Progress().bar(f"{len(batches)} batches", left * context, "tokens") as bar:
        for number, batch in enumerate(batches):
            start = time.monotonic()
            if is_saved(partial, number):
                continue
            if start + last > until:
                break
            torch.manual_seed(batch_seed(seed, number))
            try:
                rows = generator.generate(scripts(batch), bar.advance)
            except torch.OutOfMemoryError as error:
                raise CapacityError(
                    f"{len(batch)} rows of {context} tokens do not fit the device's memory; lower --batch or --context"
                ) from error
            save_batch(partial, number, rows)
            answers += sum(int((row.roles == ANSWER).sum()) for row in rows)
            last = time.monotonic() - start
    return Throughput(answers, time.monotonic() - began)


def batch_seed(seed: int, batch: int) -> int:
    """Combine the seed of the run, at least 0, and the number of a batch."""
    return int(np.random.SeedSequence([seed, batch]).generate_state(1, np.uint64)[0])
