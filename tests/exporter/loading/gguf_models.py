"""Small GGUF files, the same bytes' worth of numbers whenever they are written: llama.cpp's logits for them are stored.

`record_gguf_logits.py` writes them for llama.cpp, the tests write them again for this project.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

LAYERS, HIDDEN, HEADS, KV_HEADS, INNER, CONTEXT = 2, 64, 4, 2, 96, 64
SPECIAL = ("<|end|>", "<|start|>")
TOKENS = (*SPECIAL, "Ċ", "Ġ", *map(chr, range(33, 126)), "!!")  # of characters, as byte-level BPE writes them
TEXT = np.random.default_rng(11).integers(2, len(TOKENS), 48).tolist()  # what the logits are recorded for
ROWS = (0, 15, 16, 17, 47)  # whose logits: at the first position, around ORIGINAL and at the last
ORIGINAL = 16  # positions before the rope was scaled

# As Llama 3.2 has them: high frequencies stay, low ones are divided by 32, those between by something between.
FACTORS = np.array([1, 1, 1, 1.4, 6.5, 32, 32, 32], np.float32)


@dataclass(frozen=True)
class Case:
    """One file: keys behind `<architecture>.`, tensors besides those of a plain model."""

    architecture: str = "llama"
    head_dim: int = HIDDEN // HEADS
    keys: Mapping[str, Any] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    norms: bool = False  # of each head's queries and keys
    output: bool = False  # an lm_head of its own
    factors: np.ndarray | None = None


def yarn(**more: float) -> dict[str, Any]:
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": ORIGINAL,
        **{f"rope.scaling.{name}": value for name, value in more.items()},
    }


QKV = ("attn_q", "attn_k", "attn_v")
CASES: dict[str, Case] = {
    "llama": Case(),
    "llama-theta": Case(output=True, keys={"rope.freq_base": 500000.0}),
    "llama-linear": Case(keys={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "llama-linear-untyped": Case(keys={"rope.scaling.factor": 2.0}),
    "llama-linear-old": Case(keys={"rope.scale_linear": 4.0}),
    "llama-none": Case(keys={"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
    "llama-yarn": Case(keys=yarn()),
    "llama-yarn-attention": Case(keys=yarn(attn_factor=1.25)),
    "llama-factors": Case(factors=FACTORS, keys={"rope.freq_base": 500000.0}),
    "llama-factors-linear": Case(factors=FACTORS, keys={"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}),
    "llama-factors-yarn": Case(factors=FACTORS, keys=yarn()),
    "llama-biases": Case(biases=(*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")),
    "llama-query-bias": Case(biases=("attn_q",)),
    "llama-wide-heads": Case(head_dim=24, output=True),
    "qwen2": Case("qwen2", biases=QKV),
    "qwen2-no-bias": Case("qwen2", output=True),
    "qwen2-yarn": Case("qwen2", biases=QKV, keys=yarn()),
    "qwen3": Case("qwen3", head_dim=24, norms=True),
    "qwen3-biases": Case("qwen3", head_dim=24, norms=True, biases=QKV, keys=yarn()),
}


def write(case: Case, path: Path, tensors: Mapping[str, np.ndarray | None] | None = None) -> Path:
    """Write a case's file; `tensors` replaces some of its tensors, None leaves one out. Return its path."""
    held = made(case) | dict(tensors or {})
    writer = gguf.GGUFWriter(path, case.architecture)
    for name, value in (_keys(case) | dict(case.keys)).items():
        if value is not None:
            _add(
                writer,
                name if name.startswith(("general.", "split.", "tokenizer.")) else f"{case.architecture}.{name}",
                value,
            )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(TOKENS))
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(TOKENS) - 2))
    writer.add_token_merges(["! !"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    for name, array in held.items():
        if array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def with_keys(case: Case, **keys: Any) -> Case:
    """The case with keys changed; dots are written as two underscores, None leaves a key out."""
    return replace(case, keys={**case.keys, **{name.replace("__", "."): value for name, value in keys.items()}})


def made(case: Case) -> dict[str, np.ndarray]:
    """All tensors of a case, numpy's shapes (outputs, inputs); those of a name are the same in all cases."""
    queries, keys = HEADS * case.head_dim, KV_HEADS * case.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (HIDDEN,),
        "attn_q": (queries, HIDDEN),
        "attn_k": (keys, HIDDEN),
        "attn_v": (keys, HIDDEN),
        "attn_output": (HIDDEN, queries),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }
    if case.norms:
        shapes |= {"attn_q_norm": (case.head_dim,), "attn_k_norm": (case.head_dim,)}
    whole = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    if case.output:
        whole["output.weight"] = (len(TOKENS), HIDDEN)
    for layer in range(LAYERS):
        whole |= {f"blk.{layer}.{name}.weight": shape for name, shape in shapes.items()}
        whole |= {f"blk.{layer}.{name}.bias": shapes[name][:1] for name in case.biases}
    tensors = {name: _random(name, shape) for name, shape in whole.items()}
    if case.factors is not None:
        tensors["rope_freqs.weight"] = case.factors
    return tensors


def _random(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(list(name.encode()))
    if "norm" in name:
        return (1 + 0.2 * rng.standard_normal(shape)).astype(np.float32)
    return (rng.standard_normal(shape) * (0.3 if name.endswith(".bias") else 0.25)).astype(np.float32)


def _keys(case: Case) -> dict[str, Any]:
    heads = {} if case.head_dim == HIDDEN // HEADS else {"key_length": case.head_dim, "value_length": case.head_dim}
    return {
        "block_count": LAYERS,
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        **{f"attention.{name}": size for name, size in heads.items()},
    }


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    adds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adds.get(type(value), writer.add_array)(name, value)
