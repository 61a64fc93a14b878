"""The ONNX Runtime backend on a tiny real bundle: binding, commit, growth, one answer with and without a tree."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from medusa_profiles.profile import TreeProfile
from medusa_runtime.backends import BACKENDS, load_backend
from medusa_runtime.backends.base import PREFILL_CHUNK, Step, literal_step
from medusa_runtime.backends.ort_cpu import OrtCpuBackend
from medusa_runtime.bundle import Bundle, rewrite_manifest
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import BackendError, BundleError, BusyError, CapacityError, MissingExtraError
from medusa_runtime.kv_cache import INITIAL_CAPACITY, KvCache
from medusa_runtime.sequence import SequenceState

from ..decoding import begun
from ..interrupting import elsewhere, interrupted


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture
def backend(bundle: Bundle) -> OrtCpuBackend:
    loaded = load_backend(bundle, threads=1)
    assert isinstance(loaded, OrtCpuBackend)
    return loaded


def literal(ids: list[int], length: int) -> Step:
    return literal_step(np.array(ids, np.int32), length, np.arange(len(ids), dtype=np.int32))


def logits(backend: OrtCpuBackend, rows: int, sequence: int = 0) -> np.ndarray:
    return np.stack([backend.read_logits(row, sequence) for row in range(rows)]).copy()


def test_committed_rows_replace_the_tokens_they_came_from(backend: OrtCpuBackend) -> None:
    ids = [5, 9, 17, 3, 44, 23]
    cache = KvCache(backend)
    backend.run(literal(ids, 0))
    whole = logits(backend, len(ids))
    cache.truncate(0)
    for token, expected in zip(ids, whole, strict=True):
        backend.run(literal([token], cache.length()))
        np.testing.assert_allclose(logits(backend, 1)[0], expected, atol=1e-4)
        cache.commit([0])
    assert cache.length() == len(ids)


@pytest.mark.parametrize("path", [[0, 1, 2], [0, 3], [0, 2, 3]])
def test_only_the_rows_of_the_path_are_kept(backend: OrtCpuBackend, path: list[int]) -> None:
    cache = KvCache(backend)
    backend.run(literal([4, 8, 15], 0))
    cache.commit(range(3))
    nodes = [16, 23, 42, 108]
    mask = np.eye(4, dtype=np.bool_)
    for child, parent in zip(path[1:], path, strict=False):
        mask[child] |= mask[parent]
    depths = mask.sum(axis=1, dtype=np.int32) - 1
    backend.run(
        Step(
            input_ids=np.array([nodes], np.int32),
            position_ids=(3 + depths)[None],
            tree_mask=mask[None],
            past_length=np.array([3], np.int32),
            logit_rows=np.arange(4, dtype=np.int32)[None],
            draft=False,
        )
    )
    cache.commit(path)
    backend.run(literal([7], cache.length()))
    grown = logits(backend, 1)[0]
    cache.truncate(0)
    backend.run(literal([4, 8, 15, *(nodes[node] for node in path), 7], 0))
    np.testing.assert_allclose(grown, logits(backend, 4 + len(path))[-1], atol=1e-4)


def test_rows_on_the_host_have_no_summaries(backend: OrtCpuBackend) -> None:
    KvCache(backend)
    with pytest.raises(RuntimeError, match="no step has been run"):
        backend.read_summary(0)
    plain = literal([4, 8, 15], 0)
    for step in (plain, replace(plain, summaries=True)):
        backend.run(step)
        assert backend.read_summary(2) is None
    with pytest.raises(IndexError):
        backend.read_summary(3)


@pytest.mark.parametrize("kind", ["a candidate without a draft", "a head too many", "a parent's candidate"])
def test_node_ids_that_no_graph_fills_are_refused(backend: OrtCpuBackend, kind: str) -> None:
    cache, candidates = KvCache(backend), backend.heads.count * backend.heads.top_k
    node, what = {
        "a candidate without a draft": (-1, "rank 0 of head 0; expected token ids only"),
        "a head too many": (-1 - candidates, f"rank 0 of head 5; expected token ids and .*, -{candidates} to -1"),
        "a parent's candidate": (-2 - 2**20, "rank 1 among the candidates of its parent; expected token ids and"),
    }[kind]
    step = replace(literal([4, 8, 15], 0), draft="draft" not in kind)
    backend.run(step)
    step.input_ids[0, 2] = node  # in a step that was bound before
    with pytest.raises(RuntimeError, match=f"a node has the id {node}, {what}"):
        backend.run(step)
    with pytest.raises(RuntimeError, match="no step has been run"):
        cache.commit([0])


def test_all_outputs_of_a_step_can_be_read(backend: OrtCpuBackend) -> None:
    model, cache = backend.model, KvCache(backend)
    with pytest.raises(RuntimeError, match="no step has been run"):
        backend.read_outputs()
    backend.run(literal([4, 8, 15], 0))
    cache.commit(range(3))
    step = literal([16, 23], 3)
    backend.run(step)
    outputs = backend.read_outputs()
    assert {name: (array.shape, array.dtype) for name, array in outputs.items()} == {
        "tokens": ((1, 2), np.int32),
        "argmax": ((1, 2), np.int32),
        "logits": ((1, 2, model.vocab_size), np.float32),
        "hidden": ((1, 2, model.hidden_size), np.float32),
        **{f"new_{what}_{i}": ((1, 2, model.kv_row), np.float32) for what in ("key", "value") for i in (0, 1)},
    }
    assert outputs["tokens"].tolist() == [[16, 23]]
    assert outputs["argmax"].tolist() == [backend.read_argmax()]
    np.testing.assert_array_equal(outputs["logits"][0], logits(backend, 2))
    for i, name in enumerate(("new_key_0", "new_key_1", "new_value_0", "new_value_1")):
        of_heads = outputs[name].reshape(2, model.kv_heads, model.head_dim)
        np.testing.assert_array_equal(of_heads.transpose(1, 0, 2), backend._arena[i, :, 3:5])
    kept = {name: array.copy() for name, array in outputs.items()}
    backend.run(literal([42, 108], 3))
    for name, array in outputs.items():  # copies: the next run leaves them alone
        np.testing.assert_array_equal(array, kept[name])
    backend.run(step)
    backend.allocate(1, 2 * INITIAL_CAPACITY)
    for name, array in backend.read_outputs().items():  # another arena is there now
        np.testing.assert_array_equal(array, kept[name])
    cache.commit([1])
    np.testing.assert_array_equal(backend._draft_hidden, outputs["hidden"][:, 1])


def test_growth_keeps_every_row(backend: OrtCpuBackend) -> None:
    ids = np.random.default_rng(3).integers(0, backend.model.vocab_size, size=40).tolist()
    backend.allocate(1, 16)
    backend.run(literal(ids[:16], 0))
    backend.commit(0, range(16), 0)
    backend.allocate(1, 64)
    backend.run(literal(ids[16:], 16))
    grown = logits(backend, 24)
    backend.run(literal(ids, 0))
    np.testing.assert_allclose(grown, logits(backend, 40)[16:], atol=1e-4)


def test_a_batch_is_refused(backend: OrtCpuBackend) -> None:
    with pytest.raises(CapacityError, match=r"one sequence at a time, got a batch of 2; load a backend for each"):
        KvCache(backend, batch=2)


def test_keeping_the_first_rows_of_a_step_copies_none(backend: OrtCpuBackend) -> None:
    cache = KvCache(backend)
    backend.run(literal([4, 8, 15, 16], 0))
    written = backend._arena.copy()
    cache.commit([0, 1, 2])
    np.testing.assert_array_equal(backend._arena, written)
    backend.run(literal([23, 42, 108], 3))
    moved = backend._arena[:, :, 5].copy()
    cache.commit([0, 2])
    np.testing.assert_array_equal(backend._arena[:, :, 4], moved)


def test_a_step_that_the_arena_cannot_hold_is_refused(backend: OrtCpuBackend) -> None:
    backend.allocate(1, 8)
    with pytest.raises(RuntimeError, match="9 rows do not fit an arena of 8"):
        backend.run(literal([3] * 4, 5))


def test_an_int8_row_has_the_same_bits_next_to_any_other_rows(tiny_precisions: Path) -> None:
    backend = load_backend(Bundle.open(tiny_precisions), precision="int8")
    backend.allocate(1, 64)
    backend.run(literal(list(range(3, 16)), 0))
    backend.commit(0, range(13), 0)
    found = []
    for beside in ([], [11], [12, 13, 14], list(range(20, 35))):
        backend.run(literal([7, *beside], 13))
        found.append(backend.read_logits(0).copy())
    for row in found[1:]:
        np.testing.assert_array_equal(row, found[0])


def test_a_step_is_bound_once_and_reads_what_its_arrays_hold_now(
    backend: OrtCpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medusa_runtime.backends import ort_cpu

    made: list[Step] = []
    original = ort_cpu.BoundStep.__init__
    monkeypatch.setattr(
        ort_cpu.BoundStep, "__init__", lambda self, *args: (made.append(args[2]), original(self, *args))[1]
    )
    KvCache(backend)
    first, second = literal([5, 9, 17], 0), literal([5, 9, 17], 0)
    backend.run(first)
    before = logits(backend, 3)
    backend.run(second)
    first.input_ids[0, 1] = 23
    backend.run(first)
    assert made == [first, second]
    after = logits(backend, 3)
    np.testing.assert_array_equal(after[0], before[0])
    assert np.abs(after[1:] - before[1:]).max(axis=1).min() > 1e-3
    backend.run(literal([5, 23, 17], 0))
    np.testing.assert_array_equal(logits(backend, 3), after)


def test_the_buffers_of_a_step_are_freed_with_it(backend: OrtCpuBackend) -> None:
    KvCache(backend)
    for _ in range(3):
        backend.run(literal([7, 8], 0))
    assert len(backend._bound_steps) == 1  # that of the last one run, whose results can still be read


@pytest.mark.parametrize("name", ["chain-2", "tree-8", "mc_sim_7b_63"])
def test_a_tree_gives_the_tokens_of_plain_decoding(bundle: Bundle, backend: OrtCpuBackend, name: str) -> None:
    decoder = Decoder(backend)
    rng = np.random.default_rng(11)
    for length in (1, 7, PREFILL_CHUNK - 1 if bundle.model.context > PREFILL_CHUNK else bundle.model.context // 2):
        prompt = rng.integers(0, bundle.model.vocab_size, size=length).tolist()
        answers = []
        for profile in (TreeProfile.plain(), bundle.profile(name)):
            decoder.set_profile(profile)
            decoder.start(prompt, max_new_tokens=40, stop_ids=())
            sequence = decoder.sequence
            assert sequence is not None
            while sequence.finish_reason is None:
                assert decoder.cache.length() == sequence.length - 1
                decoder.step()
            answers.append(sequence.answer)
        assert answers[0] == answers[1]
        assert len(answers[0]) == min(40, bundle.model.context - length)


def test_decoding_grows_past_the_first_capacity(bundle: Bundle, backend: OrtCpuBackend) -> None:
    decoder = Decoder(backend, bundle.profile("tree-4"))
    start = min(INITIAL_CAPACITY, bundle.model.context) - 20
    decoder.start([3] * start, max_new_tokens=10_000, stop_ids=())
    sequence = decoder.sequence
    assert sequence is not None
    while sequence.finish_reason is None:
        decoder.step()
    assert sequence.finish_reason == "length"
    assert sequence.length == bundle.model.context


def test_an_interrupt_anywhere_in_a_step_costs_no_token(backend: OrtCpuBackend, bundle: Bundle) -> None:
    """At each line of the backend and of the cache, in a step in which the cache grows."""
    decoder = Decoder(backend, bundle.profile("tree-4"))

    def started() -> SequenceState:
        backend.allocate(1, 2)  # so that the step has to grow the arena, and to bind anew
        decoder.cache.truncate(0)
        decoder.cache.capacity = 2
        return begun(decoder, [5, 9, 17], 6, ())

    sequence = started()
    while sequence.finish_reason is None:
        decoder.step()
    wanted, number, came_so_far = sequence.answer, 0, True
    while came_so_far:
        sequence = started()
        decoder.cache.capacity = 3
        came_so_far = interrupted(decoder.step, number, ("backends/ort_cpu.py", "kv_cache.py"))
        while sequence.finish_reason is None:
            decoder.step()
        assert sequence.answer == wanted, number
        number += 1
    assert number > 50


def test_a_step_is_never_run_with_the_binding_of_another(backend: OrtCpuBackend) -> None:
    KvCache(backend)
    first, second = literal([5, 9, 17], 0), literal([23, 4], 0)
    backend.run(first)
    expected = [backend.read_argmax()]
    backend.run(second)
    expected.append(backend.read_argmax())
    number, came_so_far = 0, True
    while came_so_far:
        backend.run(first)
        came_so_far = interrupted(partial(backend.run, second), number, ("backends/ort_cpu.py",))
        for step, wanted in zip((first, second, first), (*expected, expected[0]), strict=True):
            backend.run(step)
            assert backend.read_argmax() == wanted, number
        number += 1
    assert number > 10


def test_results_of_a_run_that_was_interrupted_cannot_be_read(
    backend: OrtCpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted:
        def run_with_iobinding(self, _io: object) -> None:
            raise KeyboardInterrupt

    KvCache(backend)
    step = literal([5, 9], 0)
    backend.run(step)
    with monkeypatch.context() as patched:
        patched.setattr(backend, "_session", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            backend.run(step)
    with pytest.raises(RuntimeError, match="no step has been run"):
        backend.read_argmax()


class Fails:
    """A session one method of which fails with a message of the library."""

    def __init__(self, session: Any, method: str, words: str) -> None:
        self._session, self._method, self._words = session, method, words

    def __getattr__(self, name: str) -> Any:
        if name == self._method:
            raise RuntimeError(self._words)
        return getattr(self._session, name)


@pytest.mark.parametrize("method", ["io_binding", "run_with_iobinding"])
@pytest.mark.parametrize(
    ("words", "kind"),
    [("[ONNXRuntimeError] : 1 : FAIL : a node broke", BackendError), ("Failed to allocate memory", CapacityError)],
)
def test_library_failures_raise_typed_errors(
    backend: OrtCpuBackend, monkeypatch: pytest.MonkeyPatch, method: str, words: str, kind: type[Exception]
) -> None:
    decoder = Decoder(backend)
    sequence = begun(decoder, [5, 9], 6, ())
    with monkeypatch.context() as patched:
        patched.setattr(backend, "_session", Fails(backend._session, method, words))
        with pytest.raises(kind, match=r"ort-cpu failed in a step of 1 tokens behind 2 in fp32: .*; expected"):
            decoder.step()
    while sequence.finish_reason is None:
        decoder.step()
    whole = begun(decoder, [5, 9], 6, ())
    while whole.finish_reason is None:
        decoder.step()
    assert sequence.answer == whole.answer


def test_an_error_of_the_library_itself_is_wrapped(backend: OrtCpuBackend) -> None:
    """ONNX Runtime refuses ids outside the embedding."""
    KvCache(backend)
    with pytest.raises(BackendError, match=r"ort-cpu failed in a step of 2 tokens behind 0 in fp32: .*indices"):
        backend.run(literal([5, 1 << 30], 0))


def test_results_belong_to_the_thread_that_ran_the_step(backend: OrtCpuBackend) -> None:
    KvCache(backend)
    backend.run(literal([5, 9, 17], 0))
    for work in (backend.read_argmax, backend.read_outputs, partial(backend.commit, 0, [0], 0)):
        assert isinstance(elsewhere(work), BusyError)
    mine = backend.read_argmax()
    assert elsewhere(partial(backend.run, literal([4], 0))) is None
    with pytest.raises(BusyError, match="the last step of ort-cpu was run by another thread"):
        backend.read_argmax()
    backend.run(literal([5, 9, 17], 0))
    assert backend.read_argmax() == mine


def test_threads_do_not_spin_between_steps(backend: OrtCpuBackend) -> None:
    options = backend._session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    with pytest.raises(RuntimeError, match="does not have"):  # within a step they do, as is the library's habit
        options.get_session_config_entry("session.intra_op.allow_spinning")


def test_a_missing_backend_or_precision_is_refused_by_name(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"unknown backend 'cuda'.*ort-cpu"):
        load_backend(bundle, "cuda")
    with pytest.raises(BundleError, match=r"int4.*it has ort-cpu-fp32"):
        load_backend(bundle, "ort-cpu", precision="int4")
    assert list(BACKENDS) == ["ort-cpu", "ort-cuda", "tensorrt", "tensorrt-rtx"]


def test_without_onnxruntime_the_pip_command_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'medusa-export\[cpu\]'"):
        load_backend(bundle)


def test_an_onnxruntime_that_would_crash_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.30.1")
    with pytest.raises(MissingExtraError, match=r"1\.30\.1 is too old.*1\.31 or newer"):
        load_backend(bundle)


def test_a_graph_cannot_reach_weights_outside_the_bundle(bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.root, tmp_path / "bundle"))
    data = folder / "graphs" / "ort-cpu-fp32.onnx.data"
    data.rename(tmp_path / data.name)
    graph = folder / "graphs" / "ort-cpu-fp32.onnx"
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"../../{data.name}"
    onnx.save(model, graph)
    rewrite_manifest(folder, bundle.manifest)
    with pytest.raises(BundleError, match=r"ort-cpu-fp32\.onnx"):
        load_backend(Bundle.open(folder))


def test_copies_of_a_past_are_those_rows_in_any_arena(backend: OrtCpuBackend) -> None:
    ids = np.random.default_rng(2).integers(5, 250, size=40).tolist()
    cache = KvCache(backend)
    backend.run(literal(ids, 0))
    whole = logits(backend, len(ids))
    cache.commit(range(30))
    saved = cache.save(30)
    assert saved.length == 30 and saved.data.nbytes == 30 * backend.past_row_bytes == 30 * cache.row_bytes
    np.testing.assert_array_equal(logits(backend, len(ids)), whole)  # the results of the run are still there
    expected = backend._arena[:, :, :30].copy()
    for length, capacity in ((30, INITIAL_CAPACITY), (12, 2 * INITIAL_CAPACITY)):
        backend.run(literal(ids[::-1], 0))  # other rows
        cache.reserve(capacity)
        cache.restore(saved, length)
        assert (cache.length(), cache.can_draft()) == (length, False)
        np.testing.assert_array_equal(backend._arena[:, :, :length], expected[:, :, :length])
        backend.run(literal(ids[length:], length))
        np.testing.assert_allclose(logits(backend, len(ids) - length), whole[length:], atol=1e-4)
    np.testing.assert_array_equal(saved.data, expected)


def test_copies_of_rows_that_do_not_exist_are_refused(backend: OrtCpuBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KvCache(backend)
    backend.run(literal([5, 9, 17], 0))
    cache.commit(range(3))
    for length in (0, 4):
        with pytest.raises(ValueError, match=f"cannot save {length} rows of a past of 3"):
            cache.save(length)
    for length in (0, INITIAL_CAPACITY + 1):
        with pytest.raises(RuntimeError, match=f"got {length} rows to copy, expected 1 to {INITIAL_CAPACITY}"):
            backend.save_past(length)
    with pytest.raises(RuntimeError, match="got 4 rows to restore, expected at most 3, the rows of the copy"):
        backend.restore_past(cache.save(3), 4)
    assert backend.default_prefix_bytes() == 256 << 20

    class Full:
        def __getitem__(self, _: Any) -> Full:
            return self

        def copy(self) -> None:
            raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(backend, "_arena", Full())
        with pytest.raises(CapacityError, match=r"no memory for a copy of 3 rows .*; set a smaller prefix_cache_bytes"):
            cache.save(3)
