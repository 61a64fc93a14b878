"""A step of each kind of engine is timed, by the backend that is to run it; TensorRT is played by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from medusa_exporter.engines import add
from medusa_exporter.engines.timing import RUNS, WARM, step_ms
from medusa_runtime.backends import cuda
from medusa_runtime.backends.tensorrt import TensorRtBackend
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import CapacityError

from ...runtime.backends.test_tensorrt import Gpu, engines, played

__all__ = ["played"]


@pytest.fixture(scope="module")
def bundle(tiny_engines: Path) -> Bundle:
    return Bundle.open(tiny_engines)


def test_every_kind_of_step(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, steps, held = TensorRtBackend.run, [], []

    def run(backend: TensorRtBackend, step: Any) -> None:
        runs(backend, step)
        steps.append(step)
        held.append(backend._cache.memory.arena.capacity if backend._cache else 0)  # no more than are read
        backend.run_seconds = 0.5 if len(steps) <= WARM else 0.002

    monkeypatch.setattr(TensorRtBackend, "run", run)
    for facts, path in engines(bundle, tmp_path).items():
        steps.clear()
        device: Any = Gpu()
        assert step_ms(facts, path, bundle.model, bundle.heads, device) == 2.0  # what warms up does not count
        assert len(steps) == WARM + RUNS
        assert (steps[0].input_ids.shape[1], steps[0].draft) == (facts.nodes, facts.draft)
        assert int(steps[0].past_length[0]) == facts.best == held[-1]


def test_an_engine_that_cannot_run_ends_the_build(  # which leaves the bundle as it was: test_make.py
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, path = next(iter(engines(bundle, tmp_path).items()))
    monkeypatch.setattr(cuda, "CudaDevice", lambda _gpu: Gpu())
    timed = add._timed(facts, path, bundle.manifest)
    assert timed.step_ms is not None and timed.step_ms > 0
    monkeypatch.setattr(cuda, "CudaDevice", lambda _gpu: Gpu(free=1000))
    with pytest.raises(CapacityError, match=r"0\.0 GB are free"):
        add._timed(facts, path, bundle.manifest)
