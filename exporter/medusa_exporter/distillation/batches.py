"""Waves of streams: each is seeded by its number and put away when it is finished, so that a run can go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from medusa_runtime.errors import CapacityError
from tqdm import tqdm

from medusa_exporter.distillation.checkpoint import is_saved, save_batch
from medusa_exporter.distillation.scripts import ANSWER, Request, RowGenerator, Script


@dataclass(frozen=True)
class Throughput:
    """What a run wrote: answer tokens (uncleaned), and the seconds that its waves took."""

    answer_tokens: int
    seconds: float


def split_batches(streams: Sequence[Request], rows: int) -> list[Sequence[Request]]:
    """Cut streams into waves of `rows`, the last one of what is left."""
    return [streams[start : start + rows] for start in range(0, len(streams), rows)]


def generate_batches(
    waves: Sequence[Sequence[Request]],
    writer: RowGenerator,
    scripts: Callable[[Sequence[Request]], list[Script]],
    partial: Path,
    *,
    context: int,
    seed: int,
    until: float,
) -> Throughput:
    """Write the waves that are not in `partial` yet and put them there.

    scripts: makes those of a wave. context: most positions of a row. until: a time.monotonic() past which no wave is
    begun, nor one that would end later if it took as long as the one before. Raises CapacityError when a wave does not
    fit the device's memory.
    """
    answers, began, last = 0, time.monotonic(), 0.0
    left = sum(len(wave) for number, wave in enumerate(waves) if not is_saved(partial, number))
    with tqdm(total=left * context, unit="tok", unit_scale=True, desc=f"{len(waves)} waves", mininterval=1) as bar:
        for number, wave in enumerate(waves):
            start = time.monotonic()
            if is_saved(partial, number):
                continue
            if start + last > until:
                break
            torch.manual_seed(batch_seed(seed, number))
            try:
                lines = writer.write(scripts(wave), bar.update)
            except torch.OutOfMemoryError as error:
                raise CapacityError(
                    f"{len(wave)} rows of {context} tokens do not fit the device's memory; lower --batch or --context"
                ) from error
            save_batch(partial, number, lines)
            answers += sum(int((line.roles == ANSWER).sum()) for line in lines)
            last = time.monotonic() - start
    return Throughput(answers, time.monotonic() - began)


def batch_seed(seed: int, wave: int) -> int:
    """Mix the run's seed, at least 0, and the wave's number."""
    return int(np.random.SeedSequence([seed, wave]).generate_state(1, np.uint64)[0])
