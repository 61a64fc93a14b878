"""The ONNX Runtime CUDA backend on a fake device in host memory: the same graphs, addresses, arenas and commits."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from medusa_exporter.compare.row_summaries import SUMMARY_ERROR, summary_error
from medusa_profiles.profile import TreeProfile
from medusa_runtime.backends import load_backend, ort_cuda
from medusa_runtime.backends.base import PREFILL_CHUNK, Backend, Step, literal_step
from medusa_runtime.backends.checked_graph import CheckedGraph
from medusa_runtime.backends.element_types import KV_TYPES
from medusa_runtime.backends.ort_cuda import MIN_TREE_NODES, OrtCudaBackend, load_on_device
from medusa_runtime.backends.step_shape import MIN_PADDED_PAST
from medusa_runtime.bundle import Bundle
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import BundleError, CapacityError, MedusaError, WrongThreadError
from medusa_runtime.kv_cache import KvCache
from medusa_runtime.tree_step import TreeStep
from medusa_runtime.warm_up import warm_up_steps

from ..interrupting import elsewhere
from .host_device import Block, HostDevice

PROMPT = [5, 9, 17, 3, 44, 23]
TREE = TreeProfile("chain", ((0,), (0, 0), (1,)))


def on_host(bundle: Bundle, precision: str, device: HostDevice | None = None) -> OrtCudaBackend:
    return load_on_device(device or HostDevice(), bundle, bundle.model, "ort-cuda", precision)


@pytest.fixture(scope="module")
def bundle(tiny_backends: Path) -> Bundle:
    return Bundle.open(tiny_backends)


def answer(decoder: Decoder, prompt: list[int], tokens: int = 40) -> list[int]:
    decoder.start(prompt, tokens, stop_ids=())
    assert decoder.sequence is not None
    while decoder.sequence.finish_reason is None:
        decoder.step()
    return decoder.sequence.answer


@pytest.mark.parametrize("name", ["plain", "tree-4", "tree-8", "tree-64"])
def test_it_decodes_what_the_cpu_does(bundle: Bundle, name: str) -> None:
    tree = TreeProfile.plain() if name == "plain" else bundle.profile(name)
    ours, cpu = Decoder(on_host(bundle, "fp32"), tree), Decoder(load_backend(bundle), tree)
    long = np.random.default_rng(1).integers(3, bundle.model.vocab_size, PREFILL_CHUNK + 40).tolist()
    for prompt in (PROMPT, long):  # the second crosses from one bound length of the past to the next
        assert answer(ours, prompt) == answer(cpu, prompt)
    assert ours.steps == cpu.steps


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-2)])
def test_its_outputs_are_the_cpus(bundle: Bundle, precision: str, tolerance: float) -> None:
    tree = bundle.profile("tree-8")
    behind = len(PROMPT) + tree.depths
    step = Step(
        input_ids=np.arange(20, 20 + tree.size, dtype=np.int32)[None],  # literals: the CPU's heads are in fewer bits
        position_ids=behind[None],
        tree_mask=np.ascontiguousarray(tree.mask[None]),
        past_length=np.array([len(PROMPT)], np.int32),
        logit_rows=np.arange(tree.size, dtype=np.int32)[None],
        draft=True,
    )
    found = []
    for backend in (on_host(bundle, precision), load_backend(bundle, precision="fp32")):
        decoder = Decoder(backend)
        decoder.start(PROMPT, 60, stop_ids=())
        backend.run(step)
        found.append(backend.read_outputs())
    assert list(found[0]) == list(found[1])
    for name, expected in found[1].items():
        got = found[0][name]
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype), name
        np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max(), rtol=0, err_msg=name)


def test_16_bit_values_become_float32() -> None:
    values = np.array([1.5, -2.25, 3e38, 1e-30], np.float32)
    upper = (values.view(np.uint32) >> 16).astype(np.uint16)
    np.testing.assert_allclose(KV_TYPES["bf16"].to_float32(upper), values, rtol=2**-7)
    halves = KV_TYPES["fp16"].to_float32(np.array([1.5, -2.25], np.float16))
    assert (halves.tolist(), halves.dtype) == ([1.5, -2.25], np.float32)


@pytest.mark.parametrize("precision", ["fp16"])
def test_a_tree_gives_plain_decodings_tokens_in_16_bits(bundle: Bundle, precision: str) -> None:
    backend = on_host(bundle, precision)
    decoder = Decoder(backend)
    plain = answer(decoder, PROMPT)
    decoder.set_profile(bundle.profile("tree-8"))
    assert answer(decoder, PROMPT) == plain
    assert backend.read_logits(0).dtype == np.float32


def check_summaries(backend: Backend, rows: int, batch: int = 1) -> None:
    """Compare the summaries of the last step with its full rows."""
    for sequence, row in np.ndindex(batch, rows):
        summary = backend.read_summary(row, sequence)
        assert summary is not None and summary.finite
        assert summary_error(backend.read_logits(row, sequence)[None], [summary]) < SUMMARY_ERROR
        assert summary.ids[0] == backend.read_argmax(sequence)[row]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rows_are_summarised_where_a_step_asks_for_it(bundle: Bundle, precision: str) -> None:
    backend = on_host(bundle, precision)
    cache = KvCache(backend)
    prompt, last = np.array(PROMPT, np.int32), np.array([1, len(PROMPT) - 1], np.int32)
    backend.run(literal_step(prompt, 0, last, summaries=True))  # padded, in the causal graph if there is one
    check_summaries(backend, 2)
    with pytest.raises(IndexError, match="row 2 does not exist"):
        backend.read_summary(2)
    cache.commit(range(len(PROMPT)))
    for tree in (TreeProfile.plain(), bundle.profile("tree-4"), bundle.profile("tree-64")):
        with_summaries, without = (TreeStep(tree, bundle.heads.top_k, kind) for kind in (True, False))
        cache.reserve(len(PROMPT) + tree.size)
        for step in (with_summaries, without, with_summaries):
            step.update(9, len(PROMPT))
            backend.run(step.step)
            if step is without:
                assert backend.read_summary(0) is None
                expected = backend.read_outputs()
            else:
                check_summaries(backend, tree.size)
        for name, array in backend.read_outputs().items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_rows_of_several_sequences_are_summarised(bundle: Bundle) -> None:
    backend, rng = on_host(bundle, "fp32"), np.random.default_rng(4)
    backend.allocate(2, 16)
    one = literal_step(rng.integers(3, 200, 5).astype(np.int32), 0, np.array([4, 0, 2], np.int32), summaries=True)
    both = {name: np.repeat(value, 2, 0) for name, value in vars(one).items() if isinstance(value, np.ndarray)}
    step = replace(one, **both)
    step.input_ids[1] += 7
    step.logit_rows[1] = [1, 3, 3]
    backend.run(step)
    check_summaries(backend, 3, batch=2)
    assert backend.read_argmax(0) != backend.read_argmax(1)


@pytest.mark.parametrize("kinds", [(True,), (False, True)])
def test_after_warming_up_with_summaries_no_shape_is_new(bundle: Bundle, kinds: tuple[bool, ...]) -> None:
    backend = on_host(bundle, "fp16")
    cache = KvCache(backend)
    trees = [TreeStep(tree, bundle.heads.top_k, kind) for tree in (TREE, TreeProfile.plain()) for kind in kinds]
    for step in warm_up_steps(backend, cache, trees):
        backend.run(step)
    ready = set(backend._cache.shapes)
    assert {shape.summaries for shape in ready} == set(kinds)
    cache.truncate(0)
    for kind in kinds:
        backend.run(literal_step(np.array(PROMPT, np.int32), 0, np.array([5], np.int32), kind))
    for tree in trees:
        tree.update(9, 6)
        backend.run(tree.step)
    assert set(backend._cache.shapes) == ready


BRANCHED = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], np.bool_)


def literal(mask: np.ndarray, length: int) -> Step:
    """A step of four literal tokens behind `length` rows, without a draft."""
    ids, places = np.array([16, 23, 42, 108], np.int32), length + mask.sum(-1, dtype=np.int32) - 1
    past, rows = np.array([length], np.int32), np.arange(4, dtype=np.int32)
    return Step(ids[None], places[None], mask[None], past, rows[None], draft=False)


def test_causal_steps_run_in_the_causal_graph_and_trees_in_the_other(bundle: Bundle) -> None:
    backend, exact = (on_host(bundle, precision) for precision in ("fp16", "fp32"))
    for one in (backend, exact):
        cache = KvCache(one)
        one.run(literal_step(np.array([4, 8, 15], np.int32), 0, np.array([2], np.int32)))
        assert one._last_run().binding.shape.causal is (one is backend)
        cache.commit(range(3))
    for mask, causal in ((np.tri(4, dtype=np.bool_), True), (BRANCHED, False)):
        for one in (backend, exact):
            one.run(literal(mask, 3))
        shape = backend._last_run().binding.shape
        assert (shape.causal, shape.T) == (causal, 4 if causal else MIN_TREE_NODES)
        for name, expected in exact.read_outputs().items():
            got = backend.read_outputs()[name]
            assert got.shape == expected.shape
            np.testing.assert_allclose(got, expected, atol=0.02 * np.abs(expected).max(), err_msg=name)


def test_without_a_causal_graph_all_steps_run_in_the_other(bundle: Bundle) -> None:
    _, graph = bundle.graph("ort-cuda", "fp16")
    both = on_host(bundle, "fp16")
    one = OrtCudaBackend(CheckedGraph(graph, bundle), bundle.model, bundle.heads, HostDevice(), "fp16")
    logits = []
    for backend in (both, one):
        assert len(answer(Decoder(backend), PROMPT)) == 40
        logits.append(backend.read_logits(0))
    assert [backend._last_run().binding.shape.T for backend in (both, one)] == [1, MIN_TREE_NODES]
    np.testing.assert_allclose(*logits, atol=0.02 * np.abs(logits[0]).max())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_after_warming_up_no_shape_is_new(bundle: Bundle, precision: str) -> None:
    backend, cold = (on_host(bundle, precision) for _ in range(2))
    decoder = Decoder(backend, bundle.profile("tree-8"))
    decoder.warm_up()
    assert backend.padded_past_lengths == (MIN_PADDED_PAST, bundle.model.context)
    ready = set(backend._cache.shapes)
    long = np.random.default_rng(2).integers(3, bundle.model.vocab_size, PREFILL_CHUNK + 20).tolist()
    for prompt in (PROMPT, long, [7]):  # the second needs the longer past, the third is a single row
        assert answer(decoder, prompt) == answer(Decoder(cold, bundle.profile("tree-8")), prompt)
    decoder.set_profile(TreeProfile.plain())
    answer(decoder, PROMPT)
    assert set(backend._cache.shapes) == ready


def test_a_graph_with_an_unknown_input_is_refused(bundle: Bundle) -> None:
    backend = on_host(bundle, "fp32")
    backend._session.input_names.add("temperature")
    with pytest.raises(
        BundleError, match="asks for 'temperature', which no step of this version has; build the bundle again"
    ):
        Decoder(backend).start(PROMPT)


def test_shared_weights_are_on_the_device_once(bundle: Bundle) -> None:
    _, graph = bundle.graph("ort-cuda", "fp16")
    device = HostDevice()
    backend = on_host(bundle, "fp16", device)
    causal = graph.with_name(ort_cuda.causal_graph_name(graph.name))
    externals, others = (
        {one.external for one in CheckedGraph(path, bundle).contents.weights if one.external}
        for path in (graph, causal)
    )
    assert others < externals  # all but the heads'
    assert sorted(device.written) == sorted(external.length for external in externals)
    del backend
    gc.collect()  # the sessions free what they were given


def test_prompts_of_many_lengths_have_few_shapes(bundle: Bundle) -> None:
    for precision, least in (("fp32", 1), ("fp16", MIN_TREE_NODES)):
        backend, answers = on_host(bundle, precision), {}
        decoder = Decoder(backend, bundle.profile("tree-4"))
        for length in range(5, 45):
            answers[length] = answer(decoder, [*PROMPT * 8][:length], tokens=2)
        shapes = {(shape.T, shape.R) for shape in backend._cache.shapes}
        tree = max(4, least)
        assert shapes == {(nodes, 1) for nodes in (8, 16, 32, 64)} | {(tree, tree)}
        assert answers[17] == answer(Decoder(on_host(bundle, precision)), [*PROMPT * 8][:17], tokens=2)


def test_prefill_steps_are_longer_with_a_causal_graph(bundle: Bundle) -> None:
    prompt = np.random.default_rng(3).integers(3, bundle.model.vocab_size, PREFILL_CHUNK + 40).tolist()
    steps = {}
    for precision in ("fp32", "fp16"):
        decoder = Decoder(on_host(bundle, precision))
        decoder.start(prompt, 2, stop_ids=())
        steps[precision] = [shape.T for shape in decoder.backend._cache.shapes]
    assert steps == {"fp32": [PREFILL_CHUNK, 64], "fp16": [512]}


def test_a_path_with_gaps_is_one_copy_for_each_run(bundle: Bundle) -> None:
    device = HostDevice()
    backend = on_host(bundle, "fp32", device)
    cache = KvCache(backend)
    backend.run(literal_step(np.array([4, 8, 15], np.int32), 0, np.array([2], np.int32)))
    device.copies.clear()
    cache.commit(range(3))
    row, tensors = bundle.model.kv_row * 4, 2 * bundle.model.layers
    assert device.copies == [(3 * row, tensors), (bundle.model.hidden_size * 4, 1)]
    backend.run(literal(BRANCHED, 3))
    device.copies.clear()
    cache.commit([0, 2, 3])
    assert [copy[0] for copy in device.copies] == [row, 2 * row, bundle.model.hidden_size * 4]
    backend.run(literal_step(np.array([7], np.int32), 6, np.array([0], np.int32)))
    grown = backend.read_logits(0)
    whole = np.array([4, 8, 15, 16, 42, 108, 7], np.int32)
    cache.truncate(0)
    backend.run(literal_step(whole, 0, np.array([6], np.int32)))
    np.testing.assert_allclose(grown, backend.read_logits(0), atol=1e-4)


def test_several_sequences_grow_together(bundle: Bundle) -> None:
    backend = on_host(bundle, "fp32")
    lengths = [3, 5]
    rng = np.random.default_rng(2)
    ids = rng.integers(3, bundle.model.vocab_size, (2, 6)).astype(np.int32)
    tri = np.broadcast_to(np.tri(5, dtype=np.bool_), (2, 5, 5)).copy()

    def step(tokens: np.ndarray, past: list[int], mask: np.ndarray) -> Step:
        T = tokens.shape[1]
        positions = np.array(past, np.int32)[:, None] + np.arange(T, dtype=np.int32)
        rows = np.full((2, 1), T - 1, np.int32)
        return Step(tokens, positions, mask, np.array(past, np.int32), rows, draft=False)

    backend.allocate(2, 8)
    backend.run(step(ids[:, :5].copy(), [0, 0], tri))
    for sequence, length in enumerate(lengths):
        backend.commit(sequence, range(length), 0)
    backend.allocate(2, 16)
    backend.run(step(np.array([[9], [11]], np.int32), lengths, np.ones((2, 1, 1), np.bool_)))
    grown = [backend.read_logits(0, sequence).copy() for sequence in range(2)]
    alone = on_host(bundle, "fp32")
    alone.allocate(1, 16)
    for sequence, token in enumerate((9, 11)):
        whole = np.array([*ids[sequence, : lengths[sequence]], token], np.int32)
        alone.run(literal_step(whole, 0, np.array([len(whole) - 1], np.int32)))
        np.testing.assert_allclose(grown[sequence], alone.read_logits(0), atol=1e-4)
    with pytest.raises(CapacityError, match="a step of 2 sequences, expected 1, for which memory is allocated"):
        alone.run(step(np.array([[9], [11]], np.int32), lengths, np.ones((2, 1, 1), np.bool_)))


def test_a_longer_past_is_another_shape(bundle: Bundle) -> None:
    backend = on_host(bundle, "fp32")
    backend.allocate(1, 16)
    assert backend._cache is not None
    assert [backend._cache.memory.padded_past(length) for length in (0, 1, MIN_PADDED_PAST, MIN_PADDED_PAST + 1)] == [
        256,
        256,
        256,
        512,
    ]


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckedGraph, "weight_bytes", 3 * 10**9)
    with pytest.raises(
        CapacityError, match=r"needs about 3\.5 GB: weights 3\.0, keys and values of 512 tokens 0\.0, .*1\.0 GB"
    ):
        on_host(bundle, "fp16", HostDevice(10**9))


def test_facts_have_device_library_and_sizes(bundle: Bundle) -> None:
    _, graph = bundle.graph("ort-cuda", "fp16")
    facts = on_host(bundle, "fp16").facts()
    expected = ("host", "onnxruntime", CheckedGraph(graph, bundle).weight_bytes, 2e9)
    assert (facts.device, facts.library, facts.weight_bytes, facts.bandwidth) == expected
    assert facts.kv_bytes_per_token == 2 * bundle.model.layers * bundle.model.kv_row * 2


def test_a_second_thread_is_refused_and_the_first_goes_on(bundle: Bundle) -> None:
    decoder = Decoder(on_host(bundle, "fp32"), bundle.profile("tree-8"))
    expected = list(answer(decoder, PROMPT))
    for work in (lambda: answer(decoder, PROMPT), decoder.warm_up):
        refused = elsewhere(work)
        assert isinstance(refused, WrongThreadError) and "ort-cuda was asked for a step in thread" in str(refused)
    assert answer(decoder, PROMPT) == expected


def test_a_long_context_is_allocated_once(bundle: Bundle) -> None:
    """The first tree step allocates no second arena."""
    sizes: list[int] = []

    class Noting(HostDevice):
        def allocate(self, size: int) -> Block:
            sizes.append(size)
            return super().allocate(size)

    for precision in ("fp32", "fp16"):
        model = replace(bundle.model, context=1 << 16)
        decoder = Decoder(load_on_device(Noting(), bundle, model, "ort-cuda", precision), bundle.profile("tree-64"))
        cache = model.context * model.kv_bytes_per_token(4 if precision == "fp32" else 2)
        sizes.clear()
        answer(decoder, PROMPT)
        assert decoder.steps
        assert max(sizes, default=0) < cache // 4


def test_the_number_of_the_gpu_reaches_the_library(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    class Second(HostDevice):
        kind, index = "cuda", 1

    asked: list[Any] = []

    def opened(_library: Any, _graph: Path, _options: Any, providers: list[Any]) -> Any:
        asked.extend(providers)
        return SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider"])

    monkeypatch.setattr(ort_cuda, "open_session", opened)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    ort_cuda._open(bundle.graph("ort-cuda", "fp32")[1], Second(), None)
    assert asked[0][0] == "CUDAExecutionProvider" and asked[0][1]["device_id"] == "1"


def test_the_requested_gpu_is_used(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(index: int) -> Any:
        raise MedusaError(f"asked for {index}")

    monkeypatch.setattr("medusa_runtime.backends.cuda.CudaDevice", refused)
    with pytest.raises(MedusaError, match="asked for 3"):
        load_backend(bundle, "ort-cuda", "fp32", gpu=3)
    assert load_backend(bundle, "ort-cpu", "fp32", gpu=3).name == "ort-cpu"  # which uses none
