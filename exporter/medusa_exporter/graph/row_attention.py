"""The KV cache and attention that transformers calls while the model is traced; both are row-major.

A row holds the keys (or values) of one token for all key heads: W = Hkv * D elements. Cache and attention enter through
transformers' extension points, so no model code is changed. Shapes: B sequences, T nodes, P past rows, Hq query heads,
Hkv key heads, D elements per head.
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
    """The past of every layer as rows (B, P, W), read only; `update` keeps the step's new rows separate.

    Args:
        keys: The past keys of each layer, (B, P, W).
        values: The past values of each layer, (B, P, W).
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
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
        """Keep the new keys and values (B, Hkv, T, D) as rows, and return past and new rows, (B, P + T, W)."""
        self.new_keys[layer_idx] = _to_rows(key_states)
        self.new_values[layer_idx] = _to_rows(value_states)
        return (
            torch.cat((self.keys[layer_idx], self.new_keys[layer_idx]), dim=1),
            torch.cat((self.values[layer_idx], self.new_values[layer_idx]), dim=1),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of past rows, P."""
        return self.keys[layer_idx].shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of keys that a query sees, and the offset of the first: (P + T, 0)."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the index of the step's first row: P."""
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
    """Compute attention as one ONNX `Attention` node over row-major keys and values.

    Args:
        module: The attention module that calls this function.
        query: (B, Hq, T, D).
        key: (B, P + T, W), from `RowMajorCache.update`.
        value: (B, P + T, W), from `RowMajorCache.update`.
        attention_mask: (B, 1, T, P + T), added to the scores.
        scaling: The factor of the scores.
        sliding_window: The layer's window, or None.
        windowed_mask: The mask that replaces `attention_mask` in layers with a window, (B, 1, T, P + T).
        softcap: The bound of the scores, applied with tanh before the mask is added.
        **kwargs: Further arguments of transformers, which are ignored.

    Returns:
        (B, T, Hq, D), and None for the attention weights.

    Raises:
        UnsupportedModelError: The model uses attention sinks.
    """
    if kwargs.get("s_aux") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} uses attention sinks, expected attention without them; export another model"
        )
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
