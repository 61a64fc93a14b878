"""A backend in a separate process answers as in this one, and a failure is reported in one sentence."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from medusa_exporter.bench import worker
from medusa_exporter.bench.timing import Question, TimedDecoder
from medusa_exporter.bench.worker import Worker, WorkerSettings
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import MissingExtraError
from medusa_runtime.loading import load_bundle

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
    loaded = load_bundle(bundle.root, profile="plain", threads=1)
    question = Question(1, 1, tuple(loaded.prompt_encoder.encode("What is a tree?")), 24)
    there, here = apart.answer(question, 0), TimedDecoder(loaded.decoder, trees).answer(question, 0)
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


def processes() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no signal masks")
def test_an_interrupt_reaches_the_worker_through_this_process_only() -> None:
    before, one = processes(), Worker("ort-cpu")
    assert one._call(os.getpid) is not None
    [child] = processes() - before
    os.kill(child, signal.SIGINT)  # a terminal sends it to all
    assert one._call(os.getpid) == child

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            one._call(time.sleep, 60)
    finally:
        signal.signal(signal.SIGALRM, previous)
    one.close()  # does not wait for the answer
    assert time.monotonic() - started < 20
    assert child not in processes()


def test_a_worker_ends_with_a_process_that_is_killed() -> None:
    code = (
        "import os, time\n"
        "from medusa_exporter.bench.worker import Worker\n"
        "if __name__ == '__main__':\n"
        "    print(Worker('ort-cpu')._call(os.getpid), flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline())
        process.kill()
        assert process.stdout.read() == ""  # the worker had the same pipe, which is closed when the last one ends


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
