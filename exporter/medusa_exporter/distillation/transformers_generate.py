"""Generates conversations with transformers' `generate`: slow, for models that do not work in lockstep."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from medusa_exporter.distillation.sampling import Sampling
from medusa_exporter.distillation.scripts import FORCED, GeneratedRow, ProgressCallback, Script, end_token_of
from medusa_exporter.distillation.template_parts import EndTokens

PADDING = 0  # any id: padded positions are masked


@dataclass
class _Row:
    """A row that is being generated, and the end token to force next, if any."""

    tokens: list[int] = field(default_factory=list)
    roles: list[int] = field(default_factory=list)
    pending: int | None = None


class TransformersGenerator:
    """Generates rows of at most `context` tokens with one decoder, segment by segment."""

    def __init__(self, model: Any, context: int, ends: EndTokens, sampling: Sampling) -> None:
        self.model, self.context, self.ends, self.sampling = model, context, ends, sampling

    def generate(self, scripts: Sequence[Script], progress: ProgressCallback) -> list[GeneratedRow]:
        """Generate one row per script, all together; see `RowGenerator`. Samples follow torch's seed."""
        rows = [_Row() for _ in scripts]
        reported = 0
        with _plain_settings(self.model):
            for number in range(max(map(len, scripts), default=0)):
                alike: dict[tuple[int, float, int], list[_Row]] = defaultdict(list)
                for row, script in zip(rows, scripts, strict=True):
                    if number < len(script):
                        segment = script[number]
                        forced = [] if row.pending is None else [row.pending]
                        self._append(row, [*forced, *segment.forced.tolist()], FORCED)
                        alike[segment.kind, segment.temperature, segment.limit].append(row)
                for (kind, temperature, limit), group in alike.items():
                    self._extend([row for row in group if len(row.tokens) < self.context], kind, temperature, limit)
                total = sum(len(row.tokens) for row in rows)
                progress(total - reported)
                reported = total
                if reported == len(rows) * self.context:
                    break
        return [
            GeneratedRow(np.array(row.tokens, np.int64), np.array(row.roles, np.uint8)).to_last_answer() for row in rows
        ]

    def _append(self, row: _Row, tokens: list[int], role: int) -> None:
        fitting = tokens[: self.context - len(row.tokens)]
        row.tokens += fitting
        row.roles += [role] * len(fitting)

    def _extend(self, rows: list[_Row], kind: int, temperature: float, limit: int) -> None:
        if not rows:
            return
        own_end = end_token_of(kind, self.ends)
        stops = {*self.ends.eos, *([] if own_end is None else [own_end])}
        room = self.context - min(len(row.tokens) for row in rows)
        for row, drawn in zip(rows, self._generate(rows, temperature, min(limit, room), stops), strict=True):
            count = next((place + 1 for place, token in enumerate(drawn) if token in stops), len(drawn))
            self._append(row, drawn[:count], kind)
            row.pending = None if drawn[count - 1] == own_end else own_end

    def _generate(self, rows: list[_Row], temperature: float, limit: int, stops: set[int]) -> list[list[int]]:
        """Let the model continue each row; tokens after the first end token of a row are not to be used."""
        longest = max(len(row.tokens) for row in rows)
        ids = torch.full((len(rows), longest), PADDING)
        mask = torch.zeros_like(ids)
        for line, seen, row in zip(ids, mask, rows, strict=True):
            line[longest - len(row.tokens) :] = torch.tensor(row.tokens)
            seen[longest - len(row.tokens) :] = 1
        rules: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            rules = {"do_sample": True, "temperature": temperature} | vars(self.sampling)
        out = self.model.generate(
            ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=limit,
            eos_token_id=sorted(stops) or None,
            pad_token_id=PADDING,
            **rules,
        )
        drawn: list[list[int]] = out[:, longest:].tolist()
        return drawn


@contextmanager
def _plain_settings(model: Any) -> Iterator[None]:
    """Ignore the model's generation_config within the block."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before
