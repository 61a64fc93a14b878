"""Many answers at once: rows in lockstep, one token a row and step, prompts forced token by token.

Every row stands at a position of its own, so prompts need no padding, a finished row is refilled at once, and one
step is one shape: on CUDA it is captured as a CUDA graph. Served models: those whose attention goes through
transformers' `ALL_ATTENTION_FUNCTIONS`.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from medusa_runtime.errors import CapacityError
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

MIN_P = 0.05  # when sampling, tokens below this share of the likeliest one's probability are left out
STEPS_PER_CHECK = 16  # between two looks at which rows have finished: each look waits for the device
ATTENTION = "medusa_lockstep"

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Job:
    """A prompt to answer.

    identity: given back with the answer. prompt: at least one id. temperature: 0 for greedy. limit: most tokens of
    the answer, at least one.
    """

    identity: int
    prompt: Ids
    temperature: float
    limit: int


@dataclass(frozen=True)
class Answer:
    """What a job became: the answer's ids, with the end token if it ended by itself."""

    identity: int
    tokens: Ids


class RowCache:
    """Keys and values of all rows, as the decoder's layers ask for them: (B, Hkv, C, D) per layer.

    `position` (B,) is read at each update: the place of each row's one new token.
    """

    def __init__(self, model: Any, rows: int, capacity: int, position: Tensor) -> None:
        config = model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, rows, heads, capacity, size)
        self.keys = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.values = torch.zeros_like(self.keys)
        self.position = position
        self.row = torch.arange(rows, device=model.device)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store key and value (B, Hkv, 1, D) at each row's position; return all of the layer's."""
        self.keys[layer_idx][self.row, :, self.position] = key[:, :, 0]
        self.values[layer_idx][self.row, :, self.position] = value[:, :, 0]
        return self.keys[layer_idx], self.values[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 -- transformers' signature
        """Positions and mask are always given, so nothing is derived from this."""
        return 0


def attend(
    _module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention of one query a row, query heads grouped by their key head, so that keys are not repeated.

    query (B, Hq, 1, D), key and value (B, Hkv, C, D), attention_mask (B, 1, 1, C) additive -> (B, 1, Hq, D).
    """
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])  # (B, Hkv, Hq / Hkv, D)
    mask = attention_mask.expand(-1, key.shape[1], grouped.shape[2], -1)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(query.shape).transpose(1, 2).contiguous(), None


@contextmanager
def lockstep_attention(model: Any) -> Iterator[None]:
    """Let `model` attend by `attend` within the block, on a GPU by the kernel that takes broadcast masks."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
    before = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION
    kernels = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    try:
        with sdpa_kernel(kernels) if model.device.type == "cuda" else nullcontext():
            yield
    finally:
        model.config._attn_implementation = before


def draw(logits: Tensor, temperature: Tensor) -> Tensor:
    """Draw one token a row from logits (B, V) fp32: the argmax where temperature (B,) is 0, else by min-p sampling.

    The Gumbel trick: argmax of logits / temperature + Gumbel noise is a draw from the softmax, without a sort.
    """
    greedy = temperature == 0
    scaled = logits / temperature.masked_fill(greedy, 1.0)[:, None]
    floor = scaled.amax(dim=-1, keepdim=True) + math.log(MIN_P)
    noise = torch.empty_like(scaled).exponential_().log_().neg_()
    sampled = (scaled + noise).masked_fill_(scaled < floor, -torch.inf).argmax(dim=-1)
    return torch.where(greedy, logits.argmax(dim=-1), sampled)


class Lockstep:
    """A decoder and B rows of C positions. All state lies on the device and keeps its address."""

    def __init__(self, model: Any, rows: int, capacity: int, eos: tuple[int, ...]) -> None:
        window = getattr(model.config, "sliding_window", None)
        if window and getattr(model.config, "use_sliding_window", True) and window < capacity:
            raise CapacityError(
                f"rows of {capacity} tokens exceed the model's sliding window of {window}; ask for fewer"
            )
        if capacity > model.config.max_position_embeddings:
            raise CapacityError(
                f"rows of {capacity} tokens exceed the model's {model.config.max_position_embeddings}; ask for fewer"
            )
        self.model, self.rows, self.capacity = model, rows, capacity
        device = model.device
        padded = (capacity + 15) // 16 * 16  # fast attention kernels want a mask of aligned rows
        self.tokens = torch.zeros(rows, capacity + 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(rows, dtype=torch.int64, device=device)  # of the token fed next
        self.prompt_length = torch.ones(rows, dtype=torch.int64, device=device)
        self.end = torch.ones(rows, dtype=torch.int64, device=device)  # the most tokens a row may hold
        self.temperature = torch.zeros(rows, device=device)
        self.done = torch.ones(rows, dtype=torch.bool, device=device)
        self.eos = torch.tensor(eos, dtype=torch.int64, device=device)
        self.slots = torch.arange(padded, device=device)
        self.cache = RowCache(model, rows, padded, self.position)
        self.step: Callable[[], None] | None = None

    @torch.inference_mode()
    def run(self, jobs: Iterable[Job], deadline: float = math.inf) -> Iterator[Answer]:
        """Answer all jobs and yield each as it ends; after `deadline` (time.monotonic()) no further one is begun.

        A job must fit: prompt + limit <= capacity; CapacityError otherwise.
        """
        waiting = iter(jobs)
        holds: list[int | None] = [None] * self.rows
        with lockstep_attention(self.model):
            self.step = step = self.step or self._captured_step()
            while True:
                free = [row for row, identity in enumerate(holds) if identity is None]
                self._fill(free, waiting if time.monotonic() < deadline else iter(()), holds)
                if all(identity is None for identity in holds):
                    return
                for _ in range(STEPS_PER_CHECK):
                    step()
                yield from self._collect(holds)

    def _fill(self, free: list[int], waiting: Iterator[Job], holds: list[int | None]) -> None:
        started = list(zip(free, waiting, strict=False))
        if not started:
            return
        tokens = np.zeros((len(started), self.capacity + 1), np.int64)
        for line, (row, job) in zip(tokens, started, strict=True):
            if not 0 < len(job.prompt) <= self.capacity - job.limit or job.limit < 1:
                raise CapacityError(
                    f"a prompt of {len(job.prompt)} tokens and an answer of {job.limit} do not fit {self.capacity}"
                )
            line[: len(job.prompt)] = job.prompt
            holds[row] = job.identity
        place = self._upload([row for row, _ in started])
        lengths = self._upload([len(job.prompt) for _, job in started])
        self.tokens[place] = torch.from_numpy(tokens).to(self.tokens.device)
        self.prompt_length[place] = lengths
        self.end[place] = lengths + self._upload([job.limit for _, job in started])
        self.temperature[place] = self._upload([job.temperature for _, job in started]).float()
        self.position[place] = 0
        self.done[place] = False

    def _upload(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, device=self.tokens.device)

    def _collect(self, holds: list[int | None]) -> Iterator[Answer]:
        done = self.done.cpu().numpy()
        ended = [row for row, identity in enumerate(holds) if identity is not None and done[row]]
        if not ended:
            return
        place = self._upload(ended)
        tokens = self.tokens[place].cpu().numpy()
        starts, stops = self.prompt_length[place].cpu().numpy(), self.position[place].cpu().numpy() + 2
        for line, row, start, stop in zip(tokens, ended, starts, stops, strict=True):
            identity, holds[row] = holds[row], None
            assert identity is not None  # noqa: S101 -- `ended` holds no free row
            yield Answer(identity, line[start:stop].copy())

    def _step(self) -> None:
        """Feed one token a row and write the next: the prompt's while it lasts, then a drawn one.

        A finished row stays at its position and is decoded again to no effect.
        """
        here = self.position[:, None]  # (B, 1)
        visible = (self.slots <= here)[:, None, None, :]  # (B, 1, 1, C)
        lowest = torch.finfo(self.model.dtype).min
        mask = torch.zeros(visible.shape, dtype=self.model.dtype, device=visible.device).masked_fill_(~visible, lowest)
        hidden = self.model.base_model(
            input_ids=self.tokens.gather(1, here),
            position_ids=here,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state  # (B, 1, H)
        logits = self.model.get_output_embeddings()(hidden[:, 0]).float()  # (B, V)
        following = self.position + 1
        given = self.tokens.gather(1, following[:, None])[:, 0]
        forced = following < self.prompt_length
        token = torch.where(forced | self.done, given, draw(logits, self.temperature))
        self.tokens.scatter_(1, following[:, None], token[:, None])
        is_end = (token[:, None] == self.eos).any(dim=1) | (following + 1 >= self.end)
        self.done |= ~forced & is_end
        self.position.copy_(torch.where(self.done, self.position, following))

    def _captured_step(self) -> Callable[[], None]:
        """Return `_step`, captured as a CUDA graph where there is CUDA and the model allows it."""
        if self.tokens.device.type != "cuda":
            return self._step
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # all rows are done: these steps change nothing
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph, decoding goes on without ({str(error).splitlines()[0]})", stacklevel=2)
            torch.cuda.synchronize()
            return self._step
        return graph.replay
