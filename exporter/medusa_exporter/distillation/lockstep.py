"""Generates many conversations at once, in lockstep: each step adds one token to every row, all at the same position.

Forced tokens pass through the same step as generated ones, so that a step has one fixed shape. A step reads only the
first `bucket` cached positions, the next multiple of `BUCKET` above its position (position 200 reads 256 positions);
on CUDA the step of each bucket is one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from medusa_runtime.errors import CapacityError
from torch import Tensor

from medusa_exporter.distillation.attention import LockstepCache, causal_mask, lockstep_attention, step_logits
from medusa_exporter.distillation.sampling import Sampling, draw
from medusa_exporter.distillation.scripts import GeneratedRow, ProgressCallback, Script, end_token_of
from medusa_exporter.distillation.template_parts import EndTokens

BUCKET = 128
STEPS_PER_CHECK = 32  # steps between checks whether all rows are finished; each check waits for the device
WARM_UP_STEPS = 2  # steps that run eagerly before a step is captured


class ScriptTables:
    """The scripts of a batch as arrays, one row per script; rows without a script stay idle.

    Attributes:
        forced: (B, C+1) int64, the tokens to force, of all segments one after another.
        stops: (B, P+1) int64, where the tokens of a segment end in `forced`; P = C.
        kinds: (B, P+1) uint8, what a segment generates; 0 after the last segment.
        temperatures: (B, P+1) float32 of each segment.
        limits: (B, P+1) int64, maximum number of tokens that a segment generates.
    """

    def __init__(self, scripts: Sequence[Script], rows: int, context: int) -> None:
        shape = (rows, context + 1)
        self.forced = np.zeros(shape, np.int64)
        self.stops = np.zeros(shape, np.int64)
        self.kinds = np.zeros(shape, np.uint8)
        self.temperatures = np.zeros(shape, np.float32)
        self.limits = np.ones(shape, np.int64)
        for row, script in enumerate(scripts):
            segments = script[:context]  # each takes a position or more
            if not segments or not len(segments[0].forced):
                raise CapacityError(
                    "a row without a first token; expected its script to begin with forced tokens: give --prompts, or "
                    "a model whose chat template writes something before a user turn"
                )
            forced = np.concatenate([segment.forced for segment in segments])[:context]
            self.forced[row, : len(forced)] = forced
            stops = np.cumsum([len(segment.forced) for segment in segments]).clip(max=context)
            self.stops[row, : len(segments)] = stops
            self.stops[row, len(segments) :] = stops[-1]
            self.kinds[row, : len(segments)] = [segment.kind for segment in segments]
            self.temperatures[row, : len(segments)] = [segment.temperature for segment in segments]
            self.limits[row, : len(segments)] = [segment.limit for segment in segments]


class LockstepGenerator:
    """Generates B rows of C positions with one decoder; all state stays on the device at fixed addresses."""

    def __init__(
        self,
        model: Any,
        rows: int,
        context: int,
        ends: EndTokens,
        sampling: Sampling,
        report: Callable[[str], None] = print,
        bucket: int = BUCKET,
    ) -> None:
        self.model, self.rows, self.context = model, rows, context
        self.sampling, self.report, self.bucket = sampling, report, bucket
        device = model.device

        def state(width: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(rows, width, dtype=dtype, device=device)

        self.tokens, self.roles = state(context), state(context, torch.uint8)
        self.forced, self.stops, self.limits = (state(context + 1) for _ in range(3))
        self.kinds, self.temperatures = state(context + 1, torch.uint8), state(context + 1, torch.float32)
        self.segment, self.cursor, self.count, self.pending = (state(1) for _ in range(4))
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.eos = torch.tensor(ends.eos, dtype=torch.int64, device=device)
        end_tokens = [-1 if (end := end_token_of(kind, ends)) is None else end for kind in range(3)]
        self.end_of_kind = torch.tensor(end_tokens, dtype=torch.int64, device=device)
        padded = -(-context // bucket) * bucket
        self.slots = torch.arange(padded, device=device)
        try:
            self.cache = LockstepCache(model, rows, padded, self.position)
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"keys and values of {rows} rows of {context} tokens do not fit {device}; lower --batch or --context"
            ) from error
        self.capturing = device.type == "cuda"
        if self.capturing:
            self.pool = torch.cuda.graph_pool_handle()  # one for all graphs: only one runs at a time
            self.side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self.warm: dict[tuple[int, bool], int] = {}

    @torch.inference_mode()
    def generate(self, scripts: Sequence[Script], progress: ProgressCallback) -> list[GeneratedRow]:
        """Generate one row for each of at most B scripts; see `RowGenerator`. Samples follow torch's seed."""
        sampling_any = any(segment.temperature > 0 for script in scripts for segment in script)
        self._begin(ScriptTables(scripts, self.rows, self.context))
        done = 0
        with lockstep_attention(self.model):
            for position in range(self.context - 1):
                self._advance((position // self.bucket + 1) * self.bucket, sampling_any)
                if (position + 1) % STEPS_PER_CHECK == 0 or position == self.context - 2:
                    idle = bool((self.kinds.gather(1, self.segment) == 0).all())
                    progress((position + 1 - done) * len(scripts))
                    done = position + 1
                    if idle:
                        break
        tokens, roles = self.tokens.cpu().numpy(), self.roles.cpu().numpy()
        return [GeneratedRow(*row).to_last_answer() for row in zip(tokens[: len(scripts)], roles, strict=False)]

    def _begin(self, tables: ScriptTables) -> None:
        for name, array in vars(tables).items():
            getattr(self, name).copy_(torch.from_numpy(array))
        for tensor in (self.tokens, self.roles, self.segment, self.count, self.position):
            tensor.zero_()
        self.tokens[:, 0] = self.forced[:, 0]
        self.cursor.fill_(1)
        self.pending.fill_(-1)

    def _step(self, bucket: int, sampling_any: bool) -> None:
        """Feed one token per row and store the next one: forced while the segment has forced tokens, then generated."""
        self.cache.seen = bucket
        mask = causal_mask(self.slots[:bucket], self.position, self.model.dtype)
        logits = step_logits(self.model, self.cache, self.tokens.index_select(1, self.position), mask)
        if sampling_any:
            drawn = draw(logits, self.temperatures.gather(1, self.segment), self.sampling)
        else:
            drawn = logits.argmax(dim=-1, keepdim=True)
        kind = self.kinds.gather(1, self.segment)  # (B, 1), as all below
        ending = self.pending >= 0  # the end token of the last segment comes first
        forced = (self.cursor < self.stops.gather(1, self.segment)) & ~ending
        role = kind.masked_fill(ending | forced, 0)
        generated = role > 0
        token = torch.where(forced, self.forced.gather(1, self.cursor), drawn * generated)
        token = torch.where(ending, self.pending, token)
        count = self.count + generated
        own_end = self.end_of_kind[kind.long()]
        stops = (token == self.eos).any(dim=1, keepdim=True) | (token == own_end)
        ended = generated & (stops | (count >= self.limits.gather(1, self.segment)))
        self.pending.copy_(own_end.masked_fill(~ended | (token == own_end), -1))
        self.cursor += forced
        self.segment += ended
        self.count.copy_(count.masked_fill(ended, 0))
        self.position += 1
        self.tokens.index_copy_(1, self.position, token)
        self.roles.index_copy_(1, self.position, role)

    def _advance(self, bucket: int, sampling_any: bool) -> None:
        """Run a step, by the CUDA graph of its bucket if it has been or can be captured."""
        key = (bucket, sampling_any)
        if key in self.graphs:
            self.graphs[key].replay()
        elif not self.capturing:
            self._step(bucket, sampling_any)
        elif self.warm.setdefault(key, 0) < WARM_UP_STEPS:  # these steps count like any other
            self.warm[key] += 1
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                self._step(bucket, sampling_any)
            torch.cuda.current_stream().wait_stream(self.side)
        else:
            self._capture(key)
            self._advance(bucket, sampling_any)

    def _capture(self, key: tuple[int, bool]) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                self._step(*key)
        except RuntimeError as error:
            self.capturing = False
            self.report(f"no CUDA graph can be captured, so steps run eagerly ({str(error).splitlines()[0]})")
            torch.cuda.synchronize()
        else:
            self.graphs[key] = graph
