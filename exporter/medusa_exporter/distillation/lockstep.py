"""Many conversations at once: rows in lockstep, one token a row and step, all at the same position.

Given tokens are forced through the same step as drawn ones, so a step is always one shape. It reads only the first
`bucket` cached positions, the next multiple of BUCKET above the position; on CUDA each bucket's step is one CUDA graph.
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
STEPS_PER_LOOK = 32  # between two looks at whether rows are left: each look waits for the device
WARM_UP_STEPS = 2  # taken before a step is captured


class ScriptTables:
    """The scripts of a wave as arrays, one row a script; rows without a script only idle.

    given (B, C+1): the tokens to force, of all parts. stops (B, P+1): where a part's end in `given`. kinds,
    temperatures, limits (B, P+1): of a part. P = C; the parts behind a script's last one have kind 0.
    """

    def __init__(self, scripts: Sequence[Script], rows: int, context: int) -> None:
        shape = (rows, context + 1)
        self.given = np.zeros(shape, np.int64)
        self.stops = np.zeros(shape, np.int64)
        self.kinds = np.zeros(shape, np.uint8)
        self.temperatures = np.zeros(shape, np.float32)
        self.limits = np.ones(shape, np.int64)
        for row, script in enumerate(scripts):
            parts = script[:context]  # each takes a position or more
            if not parts or not len(parts[0].given):
                raise CapacityError("a row without a first token; expected its script to begin with given tokens")
            given = np.concatenate([part.given for part in parts])[:context]
            self.given[row, : len(given)] = given
            stops = np.cumsum([len(part.given) for part in parts]).clip(max=context)
            self.stops[row, : len(parts)] = stops
            self.stops[row, len(parts) :] = stops[-1]
            self.kinds[row, : len(parts)] = [part.kind for part in parts]
            self.temperatures[row, : len(parts)] = [part.temperature for part in parts]
            self.limits[row, : len(parts)] = [part.limit for part in parts]


class LockstepGenerator:
    """A decoder and B rows of C positions. All state lies on the device and keeps its address."""

    def __init__(
        self,
        model: Any,
        rows: int,
        context: int,
        ends: EndTokens,
        sampling: Sampling,
        echo: Callable[[str], None] = print,
        bucket: int = BUCKET,
    ) -> None:
        self.model, self.rows, self.context = model, rows, context
        self.sampling, self.echo, self.bucket = sampling, echo, bucket
        device = model.device

        def state(width: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(rows, width, dtype=dtype, device=device)

        self.tokens, self.roles = state(context), state(context, torch.uint8)
        self.given, self.stops, self.limits = (state(context + 1) for _ in range(3))
        self.kinds, self.temperatures = state(context + 1, torch.uint8), state(context + 1, torch.float32)
        self.part, self.cursor, self.count, self.pending = (state(1) for _ in range(4))
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.eos = torch.tensor(ends.eos, dtype=torch.int64, device=device)
        forced = [-1 if (end := end_token_of(kind, ends)) is None else end for kind in range(3)]
        self.end_of_kind = torch.tensor(forced, dtype=torch.int64, device=device)
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
    def write(self, scripts: Sequence[Script], tick: ProgressCallback) -> list[GeneratedRow]:
        """Write one line a script, of at most B; see `RowGenerator`. Draws follow torch's seed."""
        drawing = any(part.temperature > 0 for script in scripts for part in script)
        self._begin(ScriptTables(scripts, self.rows, self.context))
        done = 0
        with lockstep_attention(self.model):
            for position in range(self.context - 1):
                self._advance((position // self.bucket + 1) * self.bucket, drawing)
                if (position + 1) % STEPS_PER_LOOK == 0 or position == self.context - 2:
                    idle = bool((self.kinds.gather(1, self.part) == 0).all())
                    tick((position + 1 - done) * len(scripts))
                    done = position + 1
                    if idle:
                        break
        tokens, roles = self.tokens.cpu().numpy(), self.roles.cpu().numpy()
        return [GeneratedRow(*line).to_last_answer() for line in zip(tokens[: len(scripts)], roles, strict=False)]

    def _begin(self, tables: ScriptTables) -> None:
        for name, array in vars(tables).items():
            getattr(self, name).copy_(torch.from_numpy(array))
        for tensor in (self.tokens, self.roles, self.part, self.count, self.position):
            tensor.zero_()
        self.tokens[:, 0] = self.given[:, 0]
        self.cursor.fill_(1)
        self.pending.fill_(-1)

    def _step(self, bucket: int, drawing: bool) -> None:
        """Feed one token a row and put down the next: a given one while the part has some, then a drawn one."""
        self.cache.seen = bucket
        mask = causal_mask(self.slots[:bucket], self.position, self.model.dtype)
        logits = step_logits(self.model, self.cache, self.tokens.index_select(1, self.position), mask)
        if drawing:
            drawn = draw(logits, self.temperatures.gather(1, self.part), self.sampling)
        else:
            drawn = logits.argmax(dim=-1, keepdim=True)
        kind = self.kinds.gather(1, self.part)  # (B, 1), as all below
        forced = self.pending >= 0
        given = (self.cursor < self.stops.gather(1, self.part)) & ~forced
        role = kind.masked_fill(forced | given, 0)
        written = role > 0
        token = torch.where(given, self.given.gather(1, self.cursor), drawn * written)
        token = torch.where(forced, self.pending, token)
        count = self.count + written
        own_end = self.end_of_kind[kind.long()]
        stops = (token == self.eos).any(dim=1, keepdim=True) | (token == own_end)
        ended = written & (stops | (count >= self.limits.gather(1, self.part)))
        self.pending.copy_(own_end.masked_fill(~ended | (token == own_end), -1))
        self.cursor += given
        self.part += ended
        self.count.copy_(count.masked_fill(ended, 0))
        self.position += 1
        self.tokens.index_copy_(1, self.position, token)
        self.roles.index_copy_(1, self.position, role)

    def _advance(self, bucket: int, drawing: bool) -> None:
        """Take a step, by the CUDA graph of its bucket where there is one or one can be made."""
        key = (bucket, drawing)
        if key in self.graphs:
            self.graphs[key].replay()
        elif not self.capturing:
            self._step(bucket, drawing)
        elif self.warm.setdefault(key, 0) < WARM_UP_STEPS:  # steps of the wave like any other
            self.warm[key] += 1
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                self._step(bucket, drawing)
            torch.cuda.current_stream().wait_stream(self.side)
        else:
            self._capture(key)
            self._advance(bucket, drawing)

    def _capture(self, key: tuple[int, bool]) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                self._step(*key)
        except RuntimeError as error:
            self.capturing = False
            self.echo(f"no CUDA graph, decoding goes on without ({str(error).splitlines()[0]})")
            torch.cuda.synchronize()
        else:
            self.graphs[key] = graph
