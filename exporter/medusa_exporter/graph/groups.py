"""Grouped queries as rows: the heads that share keys and values become rows of one product.

A decoder of Hq query heads and Hkv key heads has G = Hq / Hkv queries for every key. Laid out as (T·G, Hkv·D), its
attention is that of Hkv heads on G times as many rows: keys and values are read once for all G. It also makes a step's
figures the same whatever the number of its rows: ONNX Runtime's product of one row adds up in another order than that
of several, and where activations are then rounded to 8 bits such a difference grows to that of another rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def group_size(config: Any) -> int:
    """Return G, how many query heads share a key head."""
    heads: int = config.num_attention_heads
    return heads // (getattr(config, "num_key_value_heads", None) or heads)


def by_group(weight: Tensor, heads: int, group: int) -> Tensor:
    """Reorder the rows of `weight` (heads·D, …), made for heads in the order (Hkv, G), into the order (G, Hkv)."""
    parts = weight.reshape(heads // group, group, -1, *weight.shape[1:])
    return parts.transpose(0, 1).reshape(weight.shape).contiguous()


@contextmanager
def queries_by_group(model: Any) -> Iterator[None]:
    """While the block runs, the decoder's query heads come in the order (G, Hkv), and its output projection takes them.

    The weights are copies, so what is traced meanwhile may keep them.
    """
    group, heads = group_size(model.config), model.config.num_attention_heads
    attentions = [layer.self_attn for layer in model.base_model.layers] if group > 1 else []
    before = [(one.q_proj.weight, one.q_proj.bias, one.o_proj.weight) for one in attentions]

    def put(attention: Any, query: Tensor, bias: Tensor | None, output: Tensor) -> None:
        attention.q_proj.weight, attention.o_proj.weight = _parameter(query), _parameter(output)
        attention.q_proj.bias = None if bias is None else _parameter(bias)

    try:
        for attention, (query, bias, output) in zip(attentions, before, strict=True):
            turned = by_group(output.T, heads, group).T.contiguous()
            turned_bias = None if bias is None else by_group(bias, heads, group)
            put(attention, by_group(query, heads, group), turned_bias, turned)
        yield
    finally:
        for attention, weights in zip(attentions, before, strict=True):
            put(attention, *weights)


def _parameter(tensor: Tensor) -> torch.nn.Parameter:
    if isinstance(tensor, torch.nn.Parameter):
        return tensor
    return torch.nn.Parameter(tensor.detach(), requires_grad=False)
