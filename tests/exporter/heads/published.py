"""Heads as each publisher lays them out, made by hand: names and shapes as their own code writes or reads them."""

import json

import torch
from safetensors.torch import save_file

H, V, K = 8, 11, 3
TOKENS = torch.tensor([9, 2, 4, 0, 7])


def linears(layers, bias=True, seed=0):
    """Weights and biases by head and layer."""
    torch.manual_seed(seed)
    pairs = [(torch.randn(H, H).half(), torch.randn(H).half()) for _ in range(K * layers)]
    return {
        (head, layer): (pairs[head * layers + layer][0], pairs[head * layers + layer][1] if bias else None)
        for head in range(K)
        for layer in range(layers)
    }


def lm_heads(rows=V, seed=1):
    torch.manual_seed(seed)
    return [torch.randn(rows, H).half() for _ in range(K)]


def decoder(seed=2):
    """A decoder's own weights, some of a type that heads must not have."""
    torch.manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(V, H).half(),
        "model.layers.0.mlp.down_proj.weight": torch.zeros(H, H, dtype=torch.int8),
        "model.layers.0.mlp.down_proj.weight_scale": torch.ones(1),
        "lm_head.weight": torch.randn(V, H).half(),
    }


def named(pattern, blocks, part=".linear"):
    """Name linears by a pattern of head and layer; absent biases stay absent."""
    found = {}
    for (head, layer), (weight, bias) in blocks.items():
        start = pattern.format(head=head, layer=layer)
        found[f"{start}{part}.weight"] = weight
        if bias is not None:
            found[f"{start}{part}.bias"] = bias
    return found


def authors(layers=1, prefix="", lm=True):
    found = named(prefix + "{head}.{layer}", linears(layers))
    if lm:
        found |= {f"{prefix}{head}.{layers}.weight": rows for head, rows in enumerate(lm_heads())}
    return found


def tensorrt_llm(layers=1):
    found = named("medusa_heads.{head}.medusa_layers.{layer}", linears(layers))
    return found | {f"medusa_heads.{head}.lm_head.weight": rows for head, rows in enumerate(lm_heads())}


def vllm(layers=1, bias=False, rows=V, prefix=""):
    found = named(prefix + "blocks.{head}.layers.{layer}", linears(layers, bias), part="")
    return found | {f"{prefix}lm_heads.{head}.weight": lm for head, lm in enumerate(lm_heads(rows))}


def write(folder, tensors, file="model.safetensors", config=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_shards(folder, shards, config=None):
    """Shards by file name, and the index that transformers writes."""
    for file, tensors in shards.items():
        write(folder, tensors, file, config)
    places = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def check(heads, blocks, lm=None, token_map=None):
    """Fail unless `heads` hold exactly these linears (absent biases: zeros), lm_heads and token_map."""
    assert heads.heads == K
    assert heads.layers == 1 + max(layer for _, layer in blocks)
    assert heads.conditioning == "none"
    for (head, layer), (weight, bias) in blocks.items():
        torch.testing.assert_close(heads.weights[layer][head].T, weight.float(), rtol=0, atol=0)
        expected = torch.zeros(H) if bias is None else bias.float()
        torch.testing.assert_close(heads.biases[layer][head, 0], expected, rtol=0, atol=0)
    if lm is None:
        assert heads.own_lm_head is None
    else:
        torch.testing.assert_close(heads.own_lm_head, torch.stack(lm).float().transpose(1, 2), rtol=0, atol=0)
    if token_map is None:
        assert heads.token_map is None
    else:
        assert heads.token_map.tolist() == token_map.tolist()
