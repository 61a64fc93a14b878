"""Attention for generation in lockstep: a static KV cache, and one query per row, all rows at the same position.

It works with models whose attention uses transformers' `ALL_ATTENTION_FUNCTIONS` and whose layers pass keys and values
to the `update` of a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from medusa_exporter.models import effective_window

ATTENTION = "medusa_lockstep"


class LockstepCache:
    """Keys and values of all rows, (L, B, Hkv, C, D) each.

    Attributes:
        keys: Cached keys.
        values: Cached values.
        position: (1,) int64, where the keys and values of a step are stored.
        seen: How many of the C positions the layers read.
    """

    def __init__(self, model: Any, rows: int, capacity: int, position: Tensor) -> None:
        config = model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, rows, heads, capacity, size)
        self.keys = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.values = torch.zeros_like(self.keys)
        self.position = position
        self.seen = capacity

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store key and value (B, Hkv, 1, D) at the position, and return the layer's first `seen` positions."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys.index_copy_(2, self.position, key)
        values.index_copy_(2, self.position, value)
        return keys[:, :, : self.seen], values[:, :, : self.seen]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 -- transformers' signature
        """Return 0: transformers derives nothing from it, because positions and mask are passed to every step."""
        return 0


def attend(
    _module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *, scaling: float, **more: Any
) -> tuple[Tensor, None]:
    """Compute the attention of one query per row, with query heads grouped by their key head.

    Grouping avoids repeating keys for every query head. query (B, Hq, 1, D), key and value (B, Hkv, C, D),
    attention_mask (1, 1, 1, C) additive -> (B, 1, Hq, D).

    Raises:
        NotImplementedError: The scores are soft-capped (Gemma 2) or have attention sinks, which the kernels lack.
    """
    if unsupported := [name for name in ("softcap", "s_aux") if more.get(name) is not None]:
        raise NotImplementedError(f"attention with {unsupported[0]}")
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])  # (B, Hkv, Hq / Hkv, D)
    mask = attention_mask.expand(*grouped.shape[:-1], -1)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(query.shape).transpose(1, 2).contiguous(), None


@contextmanager
def lockstep_attention(model: Any) -> Iterator[None]:
    """Let `model` use `attend` within the block, on a GPU with the kernel that accepts broadcast masks."""
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


def step_logits(model: Any, cache: LockstepCache, ids: Tensor, mask: Tensor) -> Tensor:
    """Feed ids (B, 1) at the cache's position, under an additive mask (1, 1, 1, `cache.seen`); return logits (B, V)."""
    logits: Tensor = model(
        input_ids=ids,
        position_ids=cache.position[None],
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
    ).logits[:, 0]  # from the model's own lm_head, which may scale or cap them
    return logits


def causal_mask(slots: Tensor, position: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask (1, 1, 1, C) for slots (C,): those up to the position are visible."""
    unseen = (slots > position)[None, None, None]
    return torch.zeros(unseen.shape, dtype=dtype, device=slots.device).masked_fill_(unseen, torch.finfo(dtype).min)


PROBE_IDS = ((5, 2, 7, 3), (3, 7, 2, 5))


@torch.inference_mode()
def lockstep_obstacle(model: Any, context: int) -> str | None:
    """Return why `model` cannot generate rows of `context` tokens in lockstep, or `None` if it can.

    Four steps are compared with the model's own forward pass.
    """
    if window := effective_window(model, context):
        return f"its sliding window of {window} tokens is shorter than the context of {context}"
    ids = torch.tensor(PROBE_IDS, device=model.device) % model.config.vocab_size  # (2, 4)
    position = torch.zeros(1, dtype=torch.int64, device=model.device)
    slots = torch.arange(16, device=model.device)
    expected = model(input_ids=ids, use_cache=False).logits[:, -1].float()
    try:
        cache = LockstepCache(model, len(ids), len(slots), position)
        with lockstep_attention(model):
            for place in range(ids.shape[1]):
                position.fill_(place)
                found = step_logits(model, cache, ids[:, place, None], causal_mask(slots, position, model.dtype))
    except Exception as error:  # a model may fail in any way; transformers' `generate` still works
        return f"its layers do not accept a static cache ({type(error).__name__}: {error})".splitlines()[0]
    if (found.float() - expected).norm() > 0.1 * expected.norm():
        return "its attention does not use transformers' ALL_ATTENTION_FUNCTIONS"
    return None
