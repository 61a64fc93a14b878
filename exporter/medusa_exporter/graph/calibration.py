"""How large each channel of what products multiply gets, on text that the model writes: fixed scales come from it."""

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

Ranges = Mapping[str, NDArray[np.float32]]  # by the name of the value: (channels,), the largest magnitude seen

ROWS, LENGTH, SEED = 16, 192, 0  # texts that the model writes, tokens of each at most, of the draws
# What a product's rows may come from if their scale is to be fixed: norms and attention keep rows within bounds. The
# gated units of an MLP do not: with a fixed scale for them too, mean KL was 0.058 in place of 0.006.
BOUNDED = ("RMSNormalization", "SkipSimplifiedLayerNormalization", "LayerNormalization", "GroupQueryAttention")


def generate_texts(model: Any, opening: Sequence[int], context: int) -> list[list[int]]:
    """Let the decoder write texts that begin with `opening`, the same each time.

    context: tokens of the bundle, which no text exceeds, for a graph's rope tables end there. An opening that would
    leave less than half of it to the model is cut.
    """
    import torch
    from transformers import GenerationConfig

    opening = opening[: max(1, context // 2)]
    length = min(LENGTH, context - len(opening))
    ids = torch.tensor(opening).unsqueeze(0).repeat(ROWS, 1)
    rules = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, max_new_tokens=length, pad_token_id=0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        texts: list[list[int]] = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=rules
        ).tolist()
    return texts


def bounded_matmuls(graph: ir.Graph) -> list[ir.Node]:
    """The products with a weight whose rows come from BOUNDED operators."""
    return [
        node
        for node in graph
        if node.op_type == "MatMul"
        and node.inputs[1] is not None
        and node.inputs[1].const_value is not None
        and (source := node.inputs[0].producer() if node.inputs[0] else None) is not None
        and source.op_type in BOUNDED
    ]


def measure_ranges(
    model: ir.Model,
    facts: ModelFacts,
    state_size: int,
    texts: Sequence[Sequence[int]],
    scratch: Path | None = None,
) -> Ranges:
    """Run a graph of the CPU's dialect over `texts` and watch what its `bounded_matmuls` multiply.

    scratch: folder to write the graph and its weights to for a while; None for the system's.
    """
    onnxruntime = import_onnxruntime("export")
    watched = model.clone()
    values = list(dict.fromkeys(node.inputs[0] for node in bounded_matmuls(watched.graph)))
    names = [str(value.name) for value in values if value is not None]
    watched.graph.outputs.extend(value for value in values if value is not None and not value.is_graph_output())
    largest: dict[str, NDArray[np.float32]] = {}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        path = Path(folder) / "watched.onnx"
        ir.save(watched, path, external_data=f"{path.name}.data")
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_prepacking", "1")  # or each weight would be copied
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for text in texts:
            found = session.run(names, _prefill(facts, state_size, text))
            for name, rows in zip(names, found, strict=True):
                here = np.abs(rows).reshape(-1, rows.shape[-1]).max(axis=0)
                largest[name] = np.maximum(largest.get(name, here), here)
        del session
    return largest


def _prefill(facts: ModelFacts, state_size: int, ids: Sequence[int]) -> dict[str, NDArray[Any]]:
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
