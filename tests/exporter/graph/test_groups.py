"""Query heads in the order of groups: a reordering that changes nothing but the order."""

from __future__ import annotations

import copy

import pytest
import torch
from medusa_exporter.graph.groups import by_group, group_size, queries_by_group

from .conftest import make_model


def test_heads_of_a_group_come_apart() -> None:
    rows = torch.arange(6).repeat_interleave(2).reshape(12, 1) * 1.0  # 6 heads of 2 rows, 2 key heads: groups of 3
    assert by_group(rows, heads=6, group=3)[::2, 0].tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_weights_are_reordered_while_the_block_runs(family: str) -> None:
    model = make_model(family)
    before = copy.deepcopy(model.state_dict())
    assert group_size(model.config) == 2
    attention = model.base_model.layers[0].self_attn
    x = torch.randn(3, 64)
    query = attention.q_proj(x).reshape(3, 2, 2, 16)  # (Hkv, G, D)
    with pytest.raises(KeyError), queries_by_group(model):
        turned = attention.q_proj(x)
        torch.testing.assert_close(turned.reshape(3, 2, 2, 16), query.transpose(1, 2))
        found = attention.o_proj(turned)
        raise KeyError
    torch.testing.assert_close(found, attention.o_proj(attention.q_proj(x)))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_heads_that_share_nothing_stay() -> None:
    model = make_model("llama")
    model.config.num_key_value_heads = model.config.num_attention_heads
    weight = model.base_model.layers[0].self_attn.q_proj.weight
    with queries_by_group(model):
        assert model.base_model.layers[0].self_attn.q_proj.weight is weight
