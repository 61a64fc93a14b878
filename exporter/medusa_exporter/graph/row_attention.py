"""What transformers calls while the model is traced: a KV cache of contiguous rows, and attention over it.

Both enter through transformers' own extension points, so no model is rewritten.
"""

from __future__ import annotations

from typing import Any

import torch
from medusa_runtime.errors import UnsupportedModelError
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION_NAME = "medusa_rows"  # the name under which `row_attention` is registered


class RowMajorCache(Cache):  # type: ignore[misc]  # transformers is not typed
    """The past of every layer as (B, P, W) rows, read only; `update` keeps this step's rows apart."""

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        """Take the past: one (B, P, W) tensor per layer in each list."""
        super().__init__(layers=[])
        self.keys, self.values = keys, values
        self.new_keys: dict[int, Tensor] = {}
        self.new_values: dict[int, Tensor] = {}

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Keep the new rows (given as (B, Hkv, T, D)) and return past and new ones together, (B, P + T, W)."""
        self.new_keys[layer_idx] = _to_rows(key_states)
        self.new_values[layer_idx] = _to_rows(value_states)
        return (
            torch.cat((self.keys[layer_idx], self.new_keys[layer_idx]), dim=1),
            torch.cat((self.values[layer_idx], self.new_values[layer_idx]), dim=1),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Rows of the past that are bound (P)."""
        return self.keys[layer_idx].shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return keys seen by a query, and the offset of the first: (P + T, 0)."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return where this step's rows begin: P."""
        return self.get_seq_length(layer_idx)


def row_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    windowed_mask: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as one ONNX `Attention` node over row-major keys and values.

    query (B, Hq, T, D); key, value (B, P + T, W) from `RowMajorCache.update`; masks (B, 1, T, P + T), added to
    the scores; `windowed_mask` is taken instead of `attention_mask` where the layer has a sliding window. softcap: what
    tanh bounds the scores by before the mask is added. Returns (B, T, Hq, D). Raises UnsupportedModelError for
    attention of a further kind.
    """
    if kwargs.get("s_aux") is not None:
        raise UnsupportedModelError(f"{type(module).__name__}: attention with sinks is not served")
    B, heads, T, D = query.shape
    mask = attention_mask if sliding_window is None else windowed_mask
    output, *_ = torch.onnx.ops.attention(
        _to_rows(query),
        key,
        value,
        mask,
        scale=scaling,
        softcap=softcap or 0.0,
        q_num_heads=heads,
        kv_num_heads=key.shape[-1] // D,
    )
    return output.reshape(B, T, heads, D), None


def _to_rows(heads_first: Tensor) -> Tensor:
    """(B, heads, T, D) -> (B, T, heads * D)."""
    B, heads, T, D = heads_first.shape
    return heads_first.transpose(1, 2).reshape(B, T, heads * D)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, row_attention)
