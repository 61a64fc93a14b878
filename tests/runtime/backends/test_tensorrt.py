"""The TensorRT backend: choice of engines and padding, on a fake TensorRT; real engines need a GPU."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from medusa_exporter.compare.row_summaries import SUMMARY_ERROR, summary_error
from medusa_profiles.profile import TreeProfile
from medusa_runtime import tensorrt_library
from medusa_runtime.backends import load_backend
from medusa_runtime.backends.base import PREFILL_CHUNK, literal_step
from medusa_runtime.backends.layer_major_arena import LayerMajorArena
from medusa_runtime.backends.step_shape import MIN_PADDED_PAST, StepShape
from medusa_runtime.backends.tensorrt import PAST_MULTIPLE, PLAIN_ENGINE_NODES, TensorRtBackend
from medusa_runtime.bundle import Bundle
from medusa_runtime.decoder import Decoder
from medusa_runtime.engine_manifest import EngineManifest
from medusa_runtime.errors import BundleError, CapacityError

from . import fake_tensorrt
from .host_device import HostDevice

STEPS: dict[str, tuple[Any, ...]] = {
    "plain": (PLAIN_ENGINE_NODES, 1, False),
    "prefill": (PREFILL_CHUNK, 1, False),
    "t4": (4, 4, True),
    "t64": (64, 64, True),
}
PROMPT = [5, 9, 17, 3, 44, 23]


class Gpu(HostDevice):
    """Host memory as a GPU of compute capability 9.0; a captured graph is the function itself."""

    compute_capability = (9, 0)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def launch(self, graph: Callable[[], None]) -> None:
        graph()


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tensorrt_library.MODULES, "tensorrt", ("played_tensorrt",))
    monkeypatch.setattr(fake_tensorrt, "__version__", "8.6.0", raising=False)
    monkeypatch.setitem(sys.modules, "played_tensorrt", fake_tensorrt)


@pytest.fixture(scope="module")
def bundle(tiny_engines: Path) -> Bundle:
    return Bundle.open(tiny_engines)


def engines(
    bundle: Bundle, folder: Path, steps: dict[str, tuple[Any, ...]] = STEPS, **other: Any
) -> dict[EngineManifest, Path]:
    found = {}
    for name, (nodes, rows, draft) in steps.items():
        graph, engine = bundle.root / f"graphs/tensorrt-fp32-{name}.onnx", folder / f"{name}.engine"
        data = str(graph).encode()
        engine.write_bytes(data)
        facts = EngineManifest(
            "tensorrt", "8.6.0", ("sm90",), "a" * 64, hashlib.sha256(data).hexdigest(), len(data), "fp32",
            1, nodes, rows, draft, 256, 256, 512, 1.0,
        )  # fmt: skip
        found[replace(facts, **other)] = engine
    return found


def backend(bundle: Bundle, folder: Path, steps: dict[str, tuple[Any, ...]] = STEPS, **other: Any) -> TensorRtBackend:
    device: Any = Gpu()
    return TensorRtBackend(engines(bundle, folder, steps, **other).items(), bundle.model, bundle.heads, device)


def answer(decoder: Decoder, prompt: list[int]) -> list[int]:
    decoder.start(prompt, 60, stop_ids=())
    assert decoder.sequence is not None
    while decoder.sequence.finish_reason is None:
        decoder.step()
    return decoder.sequence.answer


@pytest.mark.parametrize("name", ["plain", "tree-4", "tree-64"])
def test_it_decodes_what_the_cpu_does(bundle: Bundle, tmp_path: Path, name: str) -> None:
    tree = TreeProfile.plain() if name == "plain" else bundle.profile(name)
    ours, cpu = Decoder(backend(bundle, tmp_path), tree), Decoder(load_backend(bundle, "ort-cpu"), tree)
    long = np.random.default_rng(1).integers(3, bundle.model.vocab_size, 230).tolist()
    for prompt in (PROMPT, long):  # the second crosses to a longer past
        assert answer(ours, prompt) == answer(cpu, prompt)


def test_outputs_are_those_of_the_step_without_its_padding(bundle: Bundle, tmp_path: Path) -> None:
    ours, cpu = backend(bundle, tmp_path), load_backend(bundle, "ort-cpu")
    for one in (ours, cpu):
        one.allocate(1, 64)
    for ids, rows in (([7, 9, 11], [2]), (PROMPT, [0, 3, 5])):  # in engines of 4 and of 64 nodes
        step = literal_step(np.array(ids, np.int32), 0, np.array(rows, np.int32))
        ours.run(step)
        cpu.run(step)
        assert len(ids) < ours._last_run().binding.shape.T
        expected = cpu.read_outputs()
        found = ours.read_outputs()
        assert list(found) == list(expected)
        for name, array in found.items():
            assert (array.shape, array.dtype) == (expected[name].shape, expected[name].dtype), name
            np.testing.assert_allclose(array, expected[name], atol=1e-4, err_msg=name)


def test_rows_are_summarised_where_a_step_asks_for_it(bundle: Bundle, tmp_path: Path) -> None:
    """The engines summarise all rows of every step."""
    ours = backend(bundle, tmp_path)
    ours.allocate(1, 64)
    for ids, rows in (([7, 9, 11], [2, 0]), (PROMPT, [0, 3, 5])):  # in engines of 4 and of 64 nodes
        step = literal_step(np.array(ids, np.int32), 0, np.array(rows, np.int32), summaries=True)
        ours.run(step)
        assert len(rows) < ours._last_run().binding.shape.S
        for row in range(len(rows)):
            summary = ours.read_summary(row)
            assert summary is not None and summary.finite
            assert summary_error(ours.read_logits(row)[None], [summary]) < SUMMARY_ERROR
        with pytest.raises(IndexError, match=f"row {len(rows)} does not exist"):
            ours.read_summary(len(rows))
        ours.run(replace(step, summaries=False))
        assert ours.read_summary(0) is None


def test_a_step_runs_in_the_smallest_engine_that_has_room(bundle: Bundle, tmp_path: Path) -> None:
    chosen = backend(bundle, tmp_path)
    assert chosen._padded_shape(StepShape(1, 1, 1, False, 256)) == StepShape(
        1, PLAIN_ENGINE_NODES, 1, False, 256, summaries=True
    )  # not those with heads
    assert chosen._padded_shape(StepShape(1, 20, 1, False, 256)) == StepShape(
        1, 64, 64, True, 256, summaries=True
    )  # the heads run, their result is not used
    assert chosen._padded_shape(StepShape(1, 1, 1, True, 256)) == StepShape(1, 4, 4, True, 256, summaries=True)
    assert chosen._padded_shape(StepShape(1, 5, 5, True, 512)) == StepShape(1, 64, 64, True, 512, summaries=True)
    assert chosen._padded_shape(StepShape(1, 200, 1, False, 256)) == StepShape(1, 256, 1, False, 256, summaries=True)
    with pytest.raises(
        CapacityError, match="no engine of tensorrt accepts a step of 1 sequences, 65 nodes, 65 with logits"
    ):
        chosen._padded_shape(StepShape(1, 65, 65, True, 256))
    static = backend(bundle, tmp_path, least=512, best=512)
    assert static._padded_shape(StepShape(1, 1, 1, False, 256)).P == 512


def test_the_context_is_what_the_engines_were_built_for(bundle: Bundle, tmp_path: Path) -> None:
    decoder = Decoder(backend(bundle, tmp_path, least=48, best=48, most=48))
    with pytest.raises(CapacityError, match=r"the prompt has 60 tokens, .* in the context of 48 tokens"):
        decoder.start(list(range(3, 63)))
    decoder.start(PROMPT, 100, stop_ids=())
    assert decoder.sequence is not None
    while decoder.sequence.finish_reason is None:
        decoder.step()
    assert decoder.sequence.length == 48


def test_an_engine_that_is_not_what_was_built_is_never_loaded(bundle: Bundle, tmp_path: Path) -> None:
    chosen = backend(bundle, tmp_path, engine="b" * 64)
    chosen.allocate(1, 64)
    with pytest.raises(BundleError, match="is not the engine that was built"):
        Decoder(chosen).start(PROMPT)


def test_an_engine_with_unknown_inputs_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    chosen = backend(bundle, tmp_path)
    chosen._new_arena = LayerMajorArena  # the layout of earlier engines
    with pytest.raises(
        BundleError, match="asks for 'new', which no step of this version has; build bundle and engines"
    ):
        Decoder(chosen).start(PROMPT)


def test_facts_have_the_weights_of_the_plain_engine(bundle: Bundle, tmp_path: Path) -> None:
    chosen = backend(bundle, tmp_path)
    facts = chosen.facts()
    assert (facts.library, facts.version, facts.device) == ("tensorrt", "8.6.0", "host")
    assert facts.weight_bytes == (tmp_path / "plain.engine").stat().st_size
    assert facts.kv_bytes_per_token == bundle.model.kv_bytes_per_token(4)


def test_the_fastest_of_timed_engines_runs_a_step(bundle: Bundle, tmp_path: Path) -> None:
    times = {PLAIN_ENGINE_NODES: 2.6, PREFILL_CHUNK: 3.1, 4: 2.4, 64: 2.3}
    found = {replace(facts, step_ms=times[facts.nodes]): path for facts, path in engines(bundle, tmp_path).items()}
    device: Any = Gpu()
    chosen = TensorRtBackend(found.items(), bundle.model, bundle.heads, device)
    assert chosen._padded_shape(StepShape(1, 1, 1, False, 256)) == StepShape(1, 64, 64, True, 256, summaries=True)
    assert chosen._padded_shape(StepShape(1, 4, 4, True, 256)) == StepShape(1, 64, 64, True, 256, summaries=True)
    assert chosen._padded_shape(StepShape(1, 90, 1, False, 256)) == StepShape(
        1, PREFILL_CHUNK, 1, False, 256, summaries=True
    )
    tree = bundle.profile("tree-4")
    assert answer(Decoder(chosen, tree), PROMPT) == answer(Decoder(load_backend(bundle, "ort-cpu"), tree), PROMPT)
    half = {replace(facts, step_ms=None if facts.nodes == 64 else 1.0): path for facts, path in found.items()}
    chosen = TensorRtBackend(half.items(), bundle.model, bundle.heads, device)
    assert chosen._padded_shape(StepShape(1, 1, 1, False, 256)) == StepShape(
        1, PLAIN_ENGINE_NODES, 1, False, 256, summaries=True
    )


def test_a_length_below_what_engines_read_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    short, device = replace(bundle.model, context=100), Gpu()
    with pytest.raises(CapacityError, match="read a past of 256 rows at least, a max_length of 100 has no room"):
        TensorRtBackend(engines(bundle, tmp_path).items(), short, bundle.heads, device)  # type: ignore[arg-type]


def test_a_length_is_rounded_down_to_past_multiple(bundle: Bundle, tmp_path: Path) -> None:
    device: Any = Gpu()
    odd = replace(bundle.model, context=MIN_PADDED_PAST + PAST_MULTIPLE + 3)
    chosen = TensorRtBackend(engines(bundle, tmp_path).items(), odd, bundle.heads, device)
    assert chosen.model.context == chosen.padded_past_lengths[-1] == MIN_PADDED_PAST + PAST_MULTIPLE
