"""Every family compared with transformers: biases and norms far from their initial values, prefill and random trees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from medusa_exporter.engines.step_sizes import StepSize
from medusa_exporter.graph import variants
from medusa_exporter.precisions import FORMATS

from .graph import test_causal, test_past_lengths, test_variants
from .graph.conftest import NEWER, OTHERS, Traced, load, make_model, trace_model
from .graph.test_in_place_kv import Arrays, garbage, random_tree, run, step

NEAR = 2e-6  # of the largest value of a row, in fp32
QUANTISED = {"int8": 0.08, "w8a8": 0.2, "int4": 0.7}  # tiny models have few channels


@pytest.fixture(scope="module", params=NEWER)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    wide = request.param in (
        "gpt_neox",
        "gemma2",
    )  # heads that see a layer's input, score some tokens and share a block
    return trace_model(make_model(request.param), "wide" if wide else "root", tmp_path_factory.mktemp("graph"))


def agrees_with_transformers(traced: Traced, seed: int) -> None:
    """Run a prompt in chunks, then a tree of random tokens; each node equals the model on the node's path."""
    rng, buffers = np.random.default_rng(seed), garbage(traced)
    prompt = rng.integers(0, traced.facts.vocab_size, size=23).tolist()
    for first, last in ((0, 9), (9, 22), (22, 23)):
        inputs = step(traced, prompt[first:last], first)
        done = run(traced.cpu, inputs, buffers)
        for row in range(first, last):
            near(done, row - first, traced.logits(prompt[: row + 1]))
    tree = random_tree(rng, 9)
    tokens = rng.integers(0, traced.facts.vocab_size, size=tree.size)
    done = run(traced.cpu, step(traced, tokens.tolist(), len(prompt), tree), buffers)
    for node in range(tree.size):
        near(done, node, traced.logits(prompt + tokens[tree.mask[node]].tolist()))


def near(done: Arrays, row: int, expected: tuple[np.ndarray, np.ndarray]) -> None:
    for name, wanted in zip(("logits", "hidden"), expected, strict=True):
        np.testing.assert_allclose(done[name][0, row], wanted, rtol=0, atol=NEAR * np.abs(wanted).max(), err_msg=name)
    assert done["argmax"][0, row] == expected[0].argmax()


@pytest.mark.parametrize("seed", [0, 1])
def test_prefill_and_a_random_tree(family: Traced, seed: int) -> None:
    agrees_with_transformers(family, seed)


def test_attention_computes_rotary_embeddings(family: Traced) -> None:
    graph = family.cpu_graph.graph
    attended = [node for node in graph if node.op_type == "GroupQueryAttention"]
    assert len(attended) == family.facts.layers
    fused = [node.attributes["do_rotary"].as_int() for node in attended]
    rotary = [node for node in graph if node.op_type == "RotaryEmbedding"]
    name = family.facts.family
    if name in ("phi3", "gpt_neox"):  # only 8 and 4 of whose elements rotate, too few for the operator
        assert fused == [0, 0] and len(rotary) == 2 * family.facts.layers
    else:
        assert fused == [1, 0 if name == "smollm3" else 1] and not rotary
    assert {node.attributes["rotary_interleaved"].as_int() for node in attended} == {int(name == "cohere")}
    assert not {"Cos", "Sin"} & {node.op_type for node in graph}  # cosines and sines are read from tables


@pytest.mark.slow
@pytest.mark.parametrize("member", OTHERS)
def test_other_members_of_the_families(member: str, tmp_path: Path) -> None:
    agrees_with_transformers(trace_model(make_model(member), "root", tmp_path), 0)


@pytest.mark.slow
def test_quantised_weights(family: Traced, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    texts = rng.integers(0, family.facts.vocab_size, size=(8, 24)).tolist()
    source = test_variants.source(family, texts)
    graphs = variants.ort_cpu_graphs(source, tuple(FORMATS))
    inputs = step(family, texts[0], 0)
    expected = run(load(graphs.pop("fp32"), tmp_path / "fp32.onnx"), inputs, garbage(family))
    for precision, graph in graphs.items():
        found = run(load(graph, tmp_path / f"{precision}.onnx"), inputs, garbage(family))
        off = np.abs(found["logits"] - expected["logits"]).max() / np.abs(expected["logits"]).max()
        assert off < QUANTISED[precision], precision


@pytest.mark.parametrize("draft", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_graphs_for_gpus_in_fp32(family: Traced, tmp_path: Path, draft: bool) -> None:
    given = test_variants.inputs(family, [7], draft=draft)
    expected, gpu, size = family.run(**given), test_variants.on_gpu(family), StepSize(1, 5, 5, draft)
    for graph in (gpu.ort_cuda("fp32"), gpu.tensorrt("fp32", size), gpu.tensorrt("fp32", size, fused=True)):
        test_variants.agree(test_variants.run(graph, tmp_path, given), expected, 1e-4)


def test_a_factor_that_16_bits_round_is_applied_in_fp32(family: Traced) -> None:
    factor = getattr(family.model.config, "residual_multiplier", None)
    products = [node for node in test_variants.on_gpu(family).cast("bf16").graph if node.op_type == "Mul"]
    held = [[value.const_value for value in node.inputs if value is not None] for node in products]
    found = [
        (node, tensor)
        for node, tensors in zip(products, held, strict=True)
        for tensor in tensors
        if tensor is not None and tensor.size == 1 and float(tensor.numpy().item()) == np.float32(factor or 0)
    ]
    assert len(found) == (0 if factor is None else 2 * family.facts.layers)
    assert {node.outputs[0].dtype for node, _ in found} <= {ir.DataType.FLOAT}


@pytest.mark.slow
def test_fused_graphs_in_16_bits(family: Traced, tmp_path: Path) -> None:
    given = test_variants.inputs(family, [7], draft=False)
    expected = family.run(**given)
    graph = test_variants.on_gpu(family).tensorrt("fp16", StepSize(1, 5, 5, draft=False), fused=True)
    kinds = {node.op_type for node in graph.graph}
    assert ("Attention" in kinds) is (family.facts.family != "gemma2")  # TensorRT's own does not support softcap
    assert kinds >= {"RotaryEmbedding"}
    scale = max(1.0, float(np.abs(expected["logits"]).max()))
    test_variants.agree(test_variants.run(graph, tmp_path, given), expected, 0.004 * scale)


@pytest.mark.slow
def test_graphs_for_gpus_in_16_bits(family: Traced, tmp_path: Path) -> None:
    test_past_lengths.test_a_prefill_in_chunks_and_a_tree(
        family, load(test_variants.on_gpu(family).ort_cuda("fp16"), tmp_path / "bound.onnx"), 0
    )
    test_causal.test_prompts_in_chunks_and_single_rows(family)
    test_variants.test_16_bits_stay_close(family, tmp_path)
    test_variants.test_tensorrts_graph_is_stable_if_all_is_rounded_to_fp16(family, tmp_path, 7)
    test_variants.test_rotary_embedding_at_a_far_position_in_16_bits(family, tmp_path)
    test_variants.test_softmax_norms_and_angles_are_in_fp32_whatever_the_rows(family, tmp_path)
    test_past_lengths.test_in_bf16_it_is_a_valid_graph_without_a_copy_of_the_past(family, tmp_path)
