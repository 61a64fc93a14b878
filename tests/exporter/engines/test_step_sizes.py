"""Which engines there are, and for how many rows of the past."""

from __future__ import annotations

from pathlib import Path

import pytest
from medusa_exporter.engines.step_sizes import (
    PLAIN_ENGINE_NODES,
    Capacity,
    StepSize,
    causal_file,
    choose_capacity,
    graph_file,
    graph_files,
    step_name,
    step_sizes,
)
from medusa_profiles import catalogue
from medusa_runtime.backends.base import PREFILL_CHUNK
from medusa_runtime.errors import BundleError


def test_one_size_is_one_engine_and_plain_and_prefill_come_always() -> None:
    trees = [catalogue.load_profile(name) for name in ("tree-8", "tree-4", "chain-3")]
    assert step_sizes(trees, batch=2) == [
        StepSize(2, PLAIN_ENGINE_NODES, 1, draft=False),
        StepSize(2, PREFILL_CHUNK, 1, draft=False),
        StepSize(2, 4, 4, draft=True),
        StepSize(2, 8, 8, draft=True),
    ]
    assert [size.name for size in step_sizes(trees, batch=1)] == ["plain", "prefill", "t4", "t8"]
    assert [size.name for size in step_sizes(trees, batch=2)] == ["plain-b2", "prefill-b2", "t4-b2", "t8-b2"]
    assert step_sizes([], batch=1) == [  # plain decoding, which can also verify what was copied from the text
        StepSize(1, PLAIN_ENGINE_NODES, PLAIN_ENGINE_NODES, draft=False),
        StepSize(1, PREFILL_CHUNK, 1, draft=False),
    ]
    assert [size.name for size in step_sizes([], batch=1)] == ["plain", "prefill"]
    assert StepSize(2, 8, 8, draft=True).sizes == {"B": 2, "T": 8, "R": 8, "S": 8, "N": 2}
    assert StepSize(2, PLAIN_ENGINE_NODES, 1, draft=False).sizes["N"] == 0


@pytest.mark.parametrize(
    ("length", "static", "expected"),
    [
        (8192, None, Capacity(256, 1024, 8192)),
        (1024, None, Capacity(256, 1024, 1024)),
        (600, None, Capacity(256, 512, 600)),
        (100, None, Capacity(96, 96, 96)),
        (2049, None, Capacity(256, 1024, 2048)),
        (8192, 1024, Capacity(1024, 1024, 1024)),
    ],
)
def test_capacity(length: int, static: int | None, expected: Capacity) -> None:
    assert choose_capacity(length, static) == expected


@pytest.mark.parametrize(
    ("length", "static", "said"),
    [(8192, 100, "got 100; use 104"), (64, 72, "72 rows has no use"), (7, None, "got a length of 7")],
)
def test_no_capacity_but_whole_units(length: int, static: int | None, said: str) -> None:
    with pytest.raises(BundleError, match=said):
        choose_capacity(length, static)


def test_a_graphs_file_names_its_step() -> None:
    file = graph_file("tensorrt", "fp16", StepSize(1, 8, 8, draft=True))
    assert file == "graphs/tensorrt-fp16-t8.onnx"
    assert step_name(file, "tensorrt-fp16") == "t8"
    assert step_name(file, "tensorrt-fp32") == ""
    assert graph_file("ort-cuda", "fp16") == "graphs/ort-cuda-fp16.onnx"
    assert step_name("graphs/ort-cuda-fp16.onnx", "ort-cuda-fp16") == ""
    assert causal_file("ort-cuda", "fp16") == "graphs/ort-cuda-fp16-causal.onnx"


def test_every_file_that_is_asked_for() -> None:
    steps = step_sizes([catalogue.load_profile("tree-8")], batch=1)
    pairs = [("ort-cpu", "fp32"), ("ort-cuda", "fp32"), ("ort-cuda", "fp16"), ("tensorrt", "fp16")]
    assert [Path(file).stem for file in graph_files(pairs, steps)] == [
        "ort-cpu-fp32",
        "ort-cuda-fp32",
        "ort-cuda-fp16",
        "ort-cuda-fp16-causal",
        *(f"tensorrt-fp16-{name}" for name in ("plain", "prefill", "t8")),
    ]
