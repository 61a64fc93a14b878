"""Measures the ranges of activations on text that the model generates; fixed scales (w8a8) are computed from them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from medusa_runtime import contract
from medusa_runtime.backends.base import literal_step
from medusa_runtime.backends.ort_library import import_onnxruntime
from numpy.typing import NDArray

if TYPE_CHECKING:
    from medusa_runtime.facts import ModelFacts

Ranges = Mapping[str, NDArray[np.float32]]  # by the name of a value: (channels,), the largest magnitude of each

TEXTS, MAX_NEW_TOKENS, SEED = 16, 192, 0  # how many texts, tokens generated for each, and the seed of sampling
# The operators whose results have bounded ranges, so that a matrix multiplication of them can have a fixed scale. The
# gated units of an MLP have not: with a fixed scale for them too, the mean KL divergence was 0.058 instead of 0.006.
BOUNDED = ("RMSNormalization", "SkipSimplifiedLayerNormalization", "LayerNormalization", "GroupQueryAttention")


def generate_texts(model: Any, opening: Sequence[int], context: int) -> list[list[int]]:
    """Let the decoder generate texts; the same call returns the same texts.

    Args:
        model: The decoder.
        opening: The token ids that each text begins with. Cut to half the context if it is longer.
        context: The bundle's context in tokens. No text is longer, because a graph's rotary tables end there.

    Returns:
        The token ids of each text.
    """
    import torch
    from transformers import GenerationConfig

    opening = opening[: max(1, context // 2)]
    length = min(MAX_NEW_TOKENS, context - len(opening))
    ids = torch.tensor(opening).unsqueeze(0).repeat(TEXTS, 1)
    rules = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, max_new_tokens=length, pad_token_id=0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        texts: list[list[int]] = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=rules
        ).tolist()
    return texts


def bounded_matmuls(graph: ir.Graph) -> list[ir.Node]:
    """Return the MatMuls by a constant weight whose rows come from a BOUNDED operator."""
    return [
        node
        for node in graph
        if node.op_type == "MatMul"
        and node.inputs[1] is not None
        and node.inputs[1].const_value is not None
        and (source := node.inputs[0].producer() if node.inputs[0] else None) is not None
        and source.op_type in BOUNDED
    ]


def bounded_source(rows: ir.Value | None) -> ir.Value | None:
    """Return the result of a BOUNDED operator that rows were selected from, such as the lm_head's; None for others."""
    while rows is not None and (node := rows.producer()) is not None:
        if node.op_type in BOUNDED:
            return rows
        rows = node.inputs[0] if node.op_type in ("Reshape", "Gather") else None
    return None


def measure_ranges(
    model: ir.Model,
    facts: ModelFacts,
    state_size: int,
    texts: Sequence[Sequence[int]],
    scratch: Path | None = None,
) -> Ranges:
    """Run a CPU graph over texts and return the range of each channel that its `bounded_matmuls` and lm_head read.

    Args:
        model: The graph, in fp32.
        facts: The decoder's sizes.
        state_size: E, the size of a row of `draft_hidden`.
        texts: Token ids of each text.
        scratch: A folder for a temporary copy of the graph and its weights; None for the system's temporary folder.
    """
    onnxruntime = import_onnxruntime("export")
    observed = model.clone()
    values = list(dict.fromkeys(node.inputs[0] for node in bounded_matmuls(observed.graph)))
    heads = (bounded_source(node.inputs[0]) for node in observed.graph if node.op_type == "Gemm")
    values += [value for value in heads if value is not None and value not in values]
    names = [str(value.name) for value in values if value is not None]
    observed.graph.outputs.extend(value for value in values if value is not None and not value.is_graph_output())
    ranges: dict[str, NDArray[np.float32]] = {}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        path = Path(folder) / "observed.onnx"
        ir.save(observed, path, external_data=f"{path.name}.data")
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_prepacking", "1")  # prepacking would copy each weight
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for text in texts:
            results = session.run(names, _prefill_inputs(facts, state_size, text))
            for name, rows in zip(names, results, strict=True):
                magnitudes = np.abs(rows).reshape(-1, rows.shape[-1]).max(axis=0)
                ranges[name] = np.maximum(ranges.get(name, magnitudes), magnitudes)
        del session
    return ranges


def _prefill_inputs(facts: ModelFacts, state_size: int, ids: Sequence[int]) -> dict[str, NDArray[Any]]:
    step = literal_step(np.array(ids, dtype=np.int32), 0, np.array([len(ids) - 1], dtype=np.int32))
    buffer = np.zeros((1, facts.kv_heads, len(ids), facts.head_dim), dtype=np.float32)
    return {
        contract.INPUT_IDS: step.input_ids,
        contract.POSITION_IDS: step.position_ids,
        contract.TREE_MASK: step.tree_mask,
        contract.PAST_LENGTH: step.past_length,
        contract.DRAFT_HIDDEN: np.zeros((0, state_size), dtype=np.float32),
        contract.LOGIT_ROWS: step.logit_rows,
        **{name(i): buffer for name in (contract.past_key, contract.past_value) for i in range(facts.layers)},
    }
