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

from medusa_exporter.distillation.partial import is_finished, put_away
from medusa_exporter.distillation.streams import ANSWER, Script, Stream, Writer


@dataclass(frozen=True)
class Pace:
    """What a run wrote: answer tokens (uncleaned), and the seconds that its waves took."""

    answer_tokens: int
    seconds: float


def split(streams: Sequence[Stream], rows: int) -> list[Sequence[Stream]]:
    """Cut streams into waves of `rows`, the last one of what is left."""
    return [streams[start : start + rows] for start in range(0, len(streams), rows)]


def write_waves(
    waves: Sequence[Sequence[Stream]],
    writer: Writer,
    scripts: Callable[[Sequence[Stream]], list[Script]],
    partial: Path,
    *,
    context: int,
    seed: int,
    until: float,
) -> Pace:
    """Write the waves that are not in `partial` yet and put them there.

    scripts: makes those of a wave. context: most positions of a row. until: a time.monotonic() past which no wave is
    begun, nor one that would end later if it took as long as the one before. Raises CapacityError when a wave does not
    fit the device's memory.
    """
    answers, began, last = 0, time.monotonic(), 0.0
    left = sum(len(wave) for number, wave in enumerate(waves) if not is_finished(partial, number))
    with tqdm(total=left * context, unit="tok", unit_scale=True, desc=f"{len(waves)} waves", mininterval=1) as bar:
        for number, wave in enumerate(waves):
            start = time.monotonic()
            if is_finished(partial, number):
                continue
            if start + last > until:
                break
            torch.manual_seed(wave_seed(seed, number))
            try:
                lines = writer.write(scripts(wave), bar.update)
            except torch.OutOfMemoryError as error:
                raise CapacityError(
                    f"{len(wave)} rows of {context} tokens do not fit the device's memory; lower --batch or --context"
                ) from error
            put_away(partial, number, lines)
            answers += sum(int((line.roles == ANSWER).sum()) for line in lines)
            last = time.monotonic() - start
    return Pace(answers, time.monotonic() - began)


def wave_seed(seed: int, wave: int) -> int:
    """Mix the run's seed, at least 0, and the wave's number."""
    return int(np.random.SeedSequence([seed, wave]).generate_state(1, np.uint64)[0])
