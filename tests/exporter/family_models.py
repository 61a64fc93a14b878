"""Small random models of every family as folders, with the tokenizer of the tiny model and sizes like its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .graph.conftest import NEWER

FEATURES: dict[str, dict[str, Any]] = {
    **NEWER,
    "gemma": {"head_dim": 32},
    "gemma2": {**NEWER["gemma2"], "head_dim": 32},
}


def save_family(family: str, like: Path, folder: Path, **features: Any) -> Path:
    """Save a random model of a family in `folder`, far from its initial values so that norms and biases matter.

    like: the folder of the tiny model. features: of the config, in place of FEATURES.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    given = json.loads((like / "config.json").read_text(encoding="utf-8"))
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept = {name: given[name] for name in (*names, "max_position_embeddings", "eos_token_id")}
    heads = {} if family == "gpt_neox" else {"num_key_value_heads": 2}
    torch.manual_seed(7)
    own = features or FEATURES.get(family, {})
    config = AutoConfig.for_model(family, **{**kept, "pad_token_id": 0, "bos_token_id": None, **heads, **own})
    config.vocab_size = given["vocab_size"]
    shutil.copytree(like, folder)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    model.save_pretrained(folder)
    return folder
