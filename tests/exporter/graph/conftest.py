"""Tiny random models of every supported family, each traced once."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from medusa_exporter.graph.fuse import fuse
from medusa_exporter.graph.grouped_queries import group_queries
from medusa_exporter.graph.in_place_kv import write_kv_in_place
from medusa_exporter.graph.rotary_tables import rotary_tables, spare_positions, with_still_row
from medusa_exporter.graph.trace import trace
from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.loading.rope import fix_longrope
from medusa_runtime import contract
from medusa_runtime.facts import ModelFacts
from transformers import AutoConfig, AutoModelForCausalLM

TOP_K, HEADS, CONTEXT = 6, 3, 128
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-large": {},  # as in real models, one residual element is so large that its square overflows fp16
    "llama-mha": {"num_key_value_heads": 4, "vocab_size": 252},  # its vocabulary can be split into equal parts
    "llama3-rope": {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    "llama-yarn": {"rope_parameters": YARN_ROPE},  # its cosines and sines are multiplied by an attention factor
    "mistral-window": {"sliding_window": 7},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"head_dim": 24},
}
NEWER: dict[str, dict[str, Any]] = {  # further families, with the options in which they differ from Llama
    "smollm3": {"no_rope_layers": [1, 0], "attention_bias": True, "mlp_bias": True},
    "olmo2": {"attention_bias": True},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "granite": {
        "attention_bias": True,
        "mlp_bias": True,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 0.3,
    },
    "cohere": {"attention_bias": True, "logit_scale": 0.25},
    "gpt_neox": {"num_key_value_heads": 4, "rotary_pct": 0.25, "vocab_size": 252},
    "gemma": {"head_dim": 256, "num_key_value_heads": 1, "attention_bias": True},
    "gemma2": {"attention_bias": True, "sliding_window": 7, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 4.0},
}
OTHERS: dict[str, dict[str, Any]] = {  # other members of these families
    "cohere-normed": {"use_qk_norm": True},
    "gpt_neox-serial": {"num_key_value_heads": 4, "rotary_pct": 1.0, "use_parallel_residual": False},
    "phi3-whole": {},
    "phi3-longrope": {  # with an attention factor
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "short_factor": [1.0, 1.1, 1.3, 1.6],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
        },
        "original_max_position_embeddings": CONTEXT // 2,
    },
    "cohere-yarn": {"rope_parameters": YARN_ROPE},
    "gemma2-uncapped": {
        "sliding_window": 4096,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 16,
    },
}
WIDE = {"taps": (1,), "trunk": 40, "token_map": torch.tensor([250, 3, 77, 12, *range(100, 200)])}
SLOW_CASES = [("qwen3", "none"), ("llama3-rope", "wide"), ("mistral-window", "wide")]  # a trace costs 5 s and more
CASES = [
    *((family, "root") for family in FAMILIES),
    ("llama", "none"),
    ("qwen3", "wide"),
    *(pytest.param(case, marks=pytest.mark.slow, id="-".join(case)) for case in SLOW_CASES),
]


@dataclass
class Traced:
    """A tiny model, its heads, and sessions that run their graphs."""

    model: Any  # as transformers runs it
    heads: MedusaHeads
    facts: ModelFacts
    session: onnxruntime.InferenceSession  # of the graph as traced
    path: Path
    cpu_graph: ir.Model  # the CPU's variant of it, fused
    cpu: onnxruntime.InferenceSession  # of that variant, with grouped queries

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(None, inputs), strict=True))

    def logits(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Logits (V,) and what the heads see (S,) behind the last of `ids`, by transformers alone."""
        with torch.no_grad():
            output = self.model(torch.tensor([ids]), output_hidden_states=True)
            seen = [output.hidden_states[-1][0, -1]]
            for layer in self.heads.taps:
                norm = self.model.base_model.layers[layer].input_layernorm
                seen.append(norm(output.hidden_states[layer])[0, -1])
        return output.logits[0, -1].numpy(), torch.cat(seen).numpy()

    def lm_head(self, rows: torch.Tensor) -> torch.Tensor:
        """The decoder's lm_head, as far as the heads score its tokens."""
        logits: torch.Tensor = self.model.get_output_embeddings()(rows)
        return logits if self.heads.token_map is None else logits[:, self.heads.token_map]

    def past(self, rows: int, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Pasts of `rows` rows full of finite garbage."""
        shape = (batch, rows, self.facts.kv_row)
        layers = range(self.facts.layers)
        names = [name for i in layers for name in (contract.past_key(i), contract.past_value(i))]
        return {name: rng.normal(size=shape, scale=50).astype(np.float32) for name in names}


def make_model(family: str) -> Any:
    torch.manual_seed(sum(map(ord, family)))
    config = AutoConfig.for_model(
        family.split("-", maxsplit=1)[0].replace("llama3", "llama"),
        **{
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 251,
            "max_position_embeddings": CONTEXT,
            "attn_implementation": "eager",
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 1,
            **(FAMILIES | NEWER | OTHERS)[family],
        },
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from initialisation, so that norms and biases matter
            parameter.add_(torch.randn_like(parameter) * 0.08)
        if family.endswith("-large"):
            model.model.layers[0].mlp.down_proj.weight[7] *= 4000
    return model


def facts_of(model: Any) -> ModelFacts:
    config = model.config
    return ModelFacts(
        name="tiny",
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        attention_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim
        if getattr(config, "head_dim", None)
        else config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        eos_token_ids=(1,),
    )


@pytest.fixture(scope="session", params=CASES, ids="-".join)
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    family, conditioning = request.param
    return trace_model(make_model(family), conditioning, tmp_path_factory.mktemp("graph"))


def trace_model(model: Any, conditioning: str, folder: Path) -> Traced:
    """Trace a model with random heads: `conditioning` as in MedusaHeads, or "wide" for heads with every option."""
    facts = facts_of(model)
    heads = MedusaHeads(
        facts.hidden_size,
        HEADS,
        2,
        "none" if conditioning == "none" else "root",
        **(WIDE if conditioning == "wide" else {}),
    )
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(std=0.2)
    reference = copy.deepcopy(model)
    fix_longrope(model)
    graph = trace(model, heads, facts, TOP_K)
    variant = graph.clone()
    tables = with_still_row(rotary_tables(model, CONTEXT + spare_positions(["ort-cpu"])))
    write_kv_in_place(variant, facts, heads.input_size, tables)
    fuse(variant)
    grouped = variant.clone()
    group_queries(grouped)
    path = folder / "step.onnx"
    sessions = [load(one, path) for one in (grouped, graph)]
    return Traced(reference, heads, facts, sessions[1], path, variant, sessions[0])


def load(graph: ir.Model, path: Path) -> onnxruntime.InferenceSession:
    ir.save(graph, path)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
