"""Heads on disk: `medusa_lm_head.safetensors` and `config.json`, safetensors only, never a pickle."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from medusa_exporter.heads.facts import (
    CONFIG_NAME,
    MAP_NAME,
    WEIGHTS_NAME,
    HeadFacts,
    HeadsError,
    heads_files,
    hub_file,
    layout_facts,
    read_head_facts,
    read_shapes,
    weights_file,
)
from medusa_exporter.heads.modules import MedusaHeads

__all__ = ["HeadsError", "heads_files", "load_heads", "read_head_facts", "save_heads"]


def save_heads(
    heads: MedusaHeads, folder: str | Path, extras: dict[str, Any], dtype: torch.dtype = torch.float16
) -> None:
    """Write `heads` into `folder`, weights in `dtype`, a token_map in int64.

    extras: further keys of config.json; `base_model_name_or_path` and `vocab_size` are expected among them.
    Raises HeadsError when a weight is not finite, or too large for `dtype`.
    """
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in _named_tensors(heads).items()}
    _check_finite(tensors, f"heads to be stored as {dtype}")
    draft = {}
    if heads.token_map is not None:
        tensors[MAP_NAME] = heads.token_map.detach().cpu().contiguous()
        draft = {"draft_vocabulary": heads.token_map.numel()}
    config = {
        "version": "2",
        "medusa_num_heads": heads.heads,
        "medusa_num_layers": heads.layers,
        "medusa_conditioning": heads.conditioning,
        "hidden_size": heads.hidden_size,
        **draft,
        **extras,
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, target / WEIGHTS_NAME, metadata={"format": "pt"})
    (target / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_heads(source: str | Path, hidden_size: int, vocab_size: int) -> MedusaHeads:
    """Load the heads of a folder or hub name ('owner/name') in fp32, for a decoder of these sizes.

    Count, depth, conditioning, own lm_heads and draft vocabulary follow from the weights; a config.json that says
    otherwise is warned of (UserWarning). Raises HeadsError for everything that cannot be these heads: see `facts`.
    """
    path = weights_file(source)
    facts = layout_facts(read_shapes(path), path)
    if facts.hidden_size != hidden_size:
        raise HeadsError(
            f"{source}: heads for hidden size {facts.hidden_size}, but the model's is {hidden_size}; "
            "give heads trained for this model"
        )
    if facts.own_lm_head_size not in (None, vocab_size, facts.draft_vocabulary):
        raise HeadsError(
            f"{source}: heads with an lm_head of {facts.own_lm_head_size} tokens, but the model's vocabulary has "
            f"{vocab_size}; give heads trained for this model"
        )
    _compare_config(source, facts, vocab_size)
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError) as error:
        raise HeadsError(f"{path}: damaged safetensors file ({error}); fetch or make it again") from error
    _check_finite(tensors, str(path))
    token_map = tensors.get(MAP_NAME)
    if token_map is not None:
        _check_token_map(token_map, vocab_size, path)
    own_size = facts.own_lm_head_size and (facts.draft_vocabulary or facts.own_lm_head_size)
    heads = MedusaHeads(hidden_size, facts.heads, facts.layers, facts.conditioning, own_size, token_map)
    _fill(heads, tensors)
    return heads.requires_grad_(False).eval()


def _named_tensors(heads: MedusaHeads) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for head in range(heads.heads):
        for layer in range(heads.layers):
            named[f"{head}.{layer}.linear.weight"] = heads.weights[layer][head].detach().cpu().T  # (H, in)
            named[f"{head}.{layer}.linear.bias"] = heads.biases[layer][head, 0].detach().cpu()
        if heads.own_lm_head is not None:
            named[f"{head}.{heads.layers}.weight"] = heads.own_lm_head[head].detach().cpu().T  # (V, H)
    return named


def _fill(heads: MedusaHeads, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for head in range(heads.heads):
            for layer in range(heads.layers):
                heads.weights[layer][head] = tensors[f"{head}.{layer}.linear.weight"].float().T
                heads.biases[layer][head, 0] = tensors[f"{head}.{layer}.linear.bias"].float()
            if heads.own_lm_head is not None:
                rows = tensors[f"{head}.{heads.layers}.weight"]
                if heads.token_map is not None and len(rows) != len(heads.token_map):  # rows for all tokens of V
                    rows = rows[heads.token_map]
                heads.own_lm_head[head] = rows.float().T


def _check_finite(tensors: dict[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise HeadsError(f"{where}: {name} holds NaN or infinite values; expected finite weights. Train again")


def _check_token_map(token_map: Tensor, vocab_size: int, path: Path) -> None:
    low, high = int(token_map.min()), int(token_map.max())
    if low < 0 or high >= vocab_size:
        raise HeadsError(
            f"{path}: {MAP_NAME} holds ids from {low} to {high}, but the model's vocabulary has {vocab_size} tokens, "
            "numbered from 0; give heads trained for this model"
        )
    if repeated := len(token_map) - len(torch.unique(token_map)):
        raise HeadsError(f"{path}: {MAP_NAME} repeats {repeated} of its ids; expected each token once. Damaged")


def _compare_config(source: str | Path, facts: HeadFacts, vocab_size: int) -> None:
    """Warn of every value in config.json that the weights contradict; a missing config.json is fine."""
    folder = Path(source).expanduser()
    try:
        path = folder / CONFIG_NAME if folder.is_dir() else hub_file(str(source), CONFIG_NAME)
    except HeadsError:
        return
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise HeadsError(f"{path}: not valid JSON ({error}); mend or remove it") from error
    if not isinstance(config, dict):
        raise HeadsError(f"{path}: holds {type(config).__name__}, expected a JSON object; mend or remove it")
    actual = {
        "medusa_num_heads": facts.heads,
        "medusa_num_layers": facts.layers,
        "medusa_conditioning": facts.conditioning,
        "hidden_size": facts.hidden_size,
        "vocab_size": vocab_size,
        "draft_vocabulary": facts.draft_vocabulary or vocab_size,
    }
    for key, value in actual.items():
        if key in config and config[key] != value:
            warnings.warn(
                f"{path}: {key} is {config[key]!r}, but weights and model say {value!r}; the weights win", stacklevel=3
            )
