"""A backend in a separate process answers as in this one, and a failure is reported in one sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from medusa_exporter.bench import worker
from medusa_exporter.bench.timing import Question, TimedDecoder
from medusa_exporter.bench.worker import Worker, WorkerSettings
from medusa_runtime import Engine
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import MissingExtraError

from .in_process import without_processes


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture
def apart() -> Iterator[Worker]:
    one = Worker("ort-cpu")
    yield one
    one.close()


def test_it_answers_from_another_process_whose_end_is_reported(bundle: Bundle, apart: Worker) -> None:
    trees = [bundle.profile("tree-8")]
    opened = apart.open(WorkerSettings(bundle, trees, threads=1))
    assert opened is not None, apart.failure
    assert (opened.precision, opened.context) == ("fp32", 512)
    assert (opened.facts.library, opened.facts.bandwidth) == ("onnxruntime", None)
    assert opened.facts.kv_bytes_per_token == bundle.model.kv_bytes_per_token(4)
    engine = Engine.load(bundle.root, profile="plain", threads=1)
    question = Question(1, 1, tuple(engine.encode("What is a tree?")), 24)
    there, here = apart.answer(question, 0), TimedDecoder(engine.decoder, trees).answer(question, 0)
    assert there is not None
    assert here is not None
    assert (there.question, there.plain.tokens) == (question, here.plain.tokens)
    assert there.trees["tree-8"].kept == here.trees["tree-8"].kept
    assert apart._call(os.getpid) != os.getpid()
    assert apart._call(os._exit, 3) is None
    assert apart.failure is not None
    assert apart.failure.startswith(
        "backend ort-cpu: its process ended unexpectedly (killed, out of memory, or a crash"
    )
    assert "run it alone: --backends ort-cpu" in apart.failure
    assert apart.answer(question, 0) is None  # and nothing is asked of it any more


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MissingExtraError("tensorrt is not installed"), "backend ort-cpu: tensorrt is not installed"),
        (OSError(28, "No space left on device"), "backend ort-cpu: .*No space left"),
        (
            RuntimeError("node\n  of the graph"),
            "backend ort-cpu: unexpected RuntimeError: node of the graph; run it alone: --backends ort-cpu",
        ),
    ],
)
def test_what_a_backend_raises_is_one_sentence_with_its_name(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fails(*_: object) -> None:
        raise error

    without_processes(monkeypatch)
    monkeypatch.setattr(worker, "load_backend", fails)
    broken = Worker("ort-cpu")
    assert broken.open(WorkerSettings(bundle, [], threads=1)) is None
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(broken.failure)
