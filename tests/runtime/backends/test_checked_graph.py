"""Graphs and their external weights are checked before ONNX Runtime gets them, and ONNX Runtime opens no file."""

from __future__ import annotations

import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from medusa_runtime import verified_file
from medusa_runtime.backends import checked_graph, load_backend
from medusa_runtime.backends.checked_graph import CheckedGraph
from medusa_runtime.backends.ort_cpu import OrtCpuBackend
from medusa_runtime.backends.ort_session import open_session
from medusa_runtime.bundle import Bundle, rewrite_manifest
from medusa_runtime.engine import Engine
from medusa_runtime.errors import ArgumentError, BundleError
from medusa_runtime.manifest import Manifest
from medusa_runtime.sampling_params import SamplingParams
from onnx import TensorProto, helper, numpy_helper

from .test_onnx_file import model, tensor

PROMPT = "the tree of the heads"


@pytest.fixture
def folder(tmp_path: Path, tiny_precisions: Path) -> Path:
    """A copy of a bundle that a test may change."""
    return Path(shutil.copytree(tiny_precisions, tmp_path / "bundle"))


def resealed(folder: Path) -> Path:
    """Write a manifest for a changed bundle."""
    stated = Manifest.from_bytes((folder / "manifest.json").read_bytes(), "m")
    rewrite_manifest(folder, stated)
    return folder


def test_weight_bytes_count_shared_data_once(tmp_path: Path) -> None:
    file = tmp_path / "graph.onnx"
    inside = numpy_helper.from_array(np.zeros((3, 5), np.float32), "inside")
    places = [("shared.data", 0, 400), ("shared.data", 0, 400), ("shared.data", 400, 1200), ("other.data", 0, 40)]
    file.write_bytes(model(inside, *(tensor(f"w{at}", place) for at, place in enumerate(places))))
    (tmp_path / "shared.data").write_bytes(bytes(1600))
    (tmp_path / "other.data").write_bytes(bytes(40))
    assert CheckedGraph(file).weight_bytes == 60 + 400 + 1200 + 40
    file.write_bytes(model())
    assert CheckedGraph(file).weight_bytes == 0


def test_a_shared_file_counts_only_as_far_as_a_graph_refers_to_it(tiny_precisions: Path) -> None:
    bundle = Bundle.open(tiny_precisions)
    sizes = []
    for precision in ("fp32", "int8", "int4"):
        path = bundle.graph("ort-cpu", precision)[1]
        own = onnx.load(path, load_external_data=False).graph.initializer
        places = {place(one): one for one in own}
        sizes.append(CheckedGraph(path, bundle).weight_bytes)
        assert sizes[-1] == sum(size(one) for one in places.values())
    assert sizes == sorted(sizes, reverse=True)


def place(one: TensorProto) -> tuple[str, ...]:
    found = {entry.key: entry.value for entry in one.external_data}
    return (found["location"], found.get("offset", "0")) if found else (one.name,)


def size(one: TensorProto) -> int:
    found = {entry.key: entry.value for entry in one.external_data}
    return int(found["length"]) if found else len(one.raw_data)


@pytest.mark.parametrize(
    ("places", "dtype", "message"),
    [
        ([("shared.data", 0, 400)], TensorProto.FLOAT16, r"w0 \(100,\) has 400 bytes, expected 200"),
        ([("shared.data", 0, 400)], TensorProto.STRING, "w0 has ONNX's type 8"),
        ([("shared.data", 40, 400)], TensorProto.FLOAT, "w0 cannot be read at .*the file has 400 bytes"),
        ([("shared.data", 2**62, 400)], TensorProto.FLOAT, "w0 cannot be read at "),
        ([("absent.data", 0, 400)], TensorProto.FLOAT, "absent.data cannot be read"),
        ([("shared.data", 0, 200), ("shared.data", 100, 200)], TensorProto.FLOAT, "shared.data.* overlap, expected"),
    ],
)
def test_external_data_of_weights_is_checked(
    tmp_path: Path, places: list[tuple[str, int, int]], dtype: int, message: str
) -> None:
    (tmp_path / "shared.data").write_bytes(bytes(400))
    weights = [tensor(f"w{at}", place) for at, place in enumerate(places)]
    for weight in weights:
        weight.data_type = dtype
    (tmp_path / "graph.onnx").write_bytes(model(*weights))
    with pytest.raises(BundleError, match=message):
        CheckedGraph(tmp_path / "graph.onnx")


def test_a_weight_in_a_file_that_the_manifest_does_not_list(folder: Path) -> None:
    graph = folder / "graphs/ort-cpu-fp32.onnx"
    made = onnx.load(graph, load_external_data=False)
    weight = next(one for one in made.graph.initializer if one.external_data)
    weight.external_data[0].value = "unlisted.data"
    onnx.save(made, graph)
    bundle = Bundle.open(resealed(folder))
    shutil.copy(folder / "graphs/shared.data", folder / "graphs/unlisted.data")  # after the bundle was checked
    with pytest.raises(BundleError, match=r"unlisted\.data.*its manifest does not list it"):
        load_backend(bundle, "ort-cpu", "fp32", threads=1)


@pytest.mark.parametrize(("domain", "operator"), [("com.example", "Run"), ("com.microsoft", "EPContext")])
def test_operators_outside_onnx_runtime_are_refused(tmp_path: Path, domain: str, operator: str) -> None:
    (tmp_path / "graph.onnx").write_bytes(model(nodes=(helper.make_node(operator, [], ["y"], domain=domain),)))
    with pytest.raises(BundleError, match=f"operator '{operator}' of domain '{domain}', expected operators of"):
        CheckedGraph(tmp_path / "graph.onnx")


def test_a_graph_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked_graph, "MAX_GRAPH", 100)
    (tmp_path / "graph.onnx").write_bytes(model())
    with pytest.raises(BundleError, match=r"has \d+ bytes, expected at most 100"):
        CheckedGraph(tmp_path / "graph.onnx")


@pytest.mark.parametrize("precision", ["fp32", "int8", "w8a8", "int4"])
def test_weights_changed_after_loading_change_no_answer(folder: Path, precision: str) -> None:
    """ONNX Runtime copies the weights, so later changes of the files have no effect."""
    engine = Engine.load(folder, precision=precision, profile="tree-4", threads=1)
    before = engine.generate(PROMPT, SamplingParams(max_tokens=20)).token_ids
    for file in [*(folder / "graphs").glob("*.data"), *(folder / "graphs").glob("*.onnx")]:
        with file.open("r+b") as opened:
            opened.write(b"\x3f" * file.stat().st_size)
    assert engine.generate(PROMPT, SamplingParams(max_tokens=20)).token_ids == before


@pytest.mark.parametrize("precision", ["fp32", "int8", "w8a8", "int4"])
def test_mapped_weights_are_read_from_the_files(folder: Path, precision: str) -> None:
    """The same answer as with a copy, until somebody writes to the files."""
    for file in (folder / "graphs").iterdir():
        os.utime(file, ns=(1, 1))
    answers = [
        Engine.load(folder, precision=precision, threads=1, map_weights=mapped)
        .generate(PROMPT, SamplingParams(max_tokens=20))
        .token_ids
        for mapped in (False, True)
    ]
    assert answers[0] == answers[1]
    engine = Engine.load(folder, precision=precision, threads=1, map_weights=True)
    maps = Path("/proc/self/maps").read_text()
    assert str(folder / "graphs/shared.data") in maps
    del engine


def test_mapping_is_true_or_false(folder: Path) -> None:
    with pytest.raises(ArgumentError, match="map_weights is 'no', of type str; expected True or False"):
        Engine.load(folder, map_weights="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["shared.data", "ort-cpu-fp32.onnx.data", "ort-cpu-fp32.onnx"])
@pytest.mark.parametrize("replaced", [True, False])
def test_weights_changed_between_opening_and_loading_are_refused(folder: Path, name: str, replaced: bool) -> None:
    """A file is replaced or written to, and its modification time is restored."""
    file = folder / "graphs" / name
    status = file.stat()
    os.utime(file, ns=(1, 1))
    bundle = Bundle.open(folder, weights=True)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    target = file.with_name("new") if replaced else file
    with target.open("wb" if replaced else "r+b") as opened:
        opened.write(data)
    os.utime(target, ns=(1, 1))
    target.replace(file)
    assert file.stat().st_size == status.st_size
    with pytest.raises(BundleError, match=f"{name} has SHA-256 .* was changed after the bundle was opened"):
        load_backend(bundle, "ort-cpu", "fp32", threads=1)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.parametrize("name", ["shared.data", "ort-cpu-fp32.onnx"])
def test_a_pipe_is_not_waited_for(folder: Path, name: str) -> None:
    bundle = Bundle.open(folder)
    (folder / "graphs" / name).unlink()
    os.mkfifo(folder / "graphs" / name)
    with pytest.raises(BundleError, match=f"{name} .* is not a regular file"):
        load_backend(bundle, "ort-cpu", "fp32", threads=1)


def test_an_interrupt_is_not_replaced_by_the_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_arguments: Any, **_options: Any) -> Any:
        raise KeyboardInterrupt

    with (folder / "graphs/shared.data").open("r+b") as opened:
        opened.write(b"\x3f")
    monkeypatch.setattr(onnxruntime, "InferenceSession", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_backend(Bundle.open(folder), "ort-cpu", "fp32", threads=1)


def test_verify_notices_a_later_change(folder: Path) -> None:
    bundle, name = Bundle.open(folder, weights=True), "graphs/shared.data"
    with (folder / name).open("r+b") as opened:
        opened.write(b"\x3f")
    with pytest.raises(BundleError, match=r"shared\.data has SHA-256"):
        bundle.verify([name])


@pytest.mark.parametrize("name", ["shared.data", "ort-cpu-fp32.onnx.data"])
def test_damaged_weights_are_found_when_they_are_loaded(folder: Path, name: str) -> None:
    with (folder / "graphs" / name).open("r+b") as opened:
        opened.write(b"\x3f")
    with pytest.raises(BundleError, match=f"{name} has SHA-256 .*, expected"):
        Bundle.open(folder, weights=True)
    bundle = Bundle.open(folder)
    with pytest.raises(BundleError, match=f"{name} has SHA-256 .*, expected"):
        load_backend(bundle, "ort-cpu", "fp32", threads=1)


def test_weights_of_other_graphs_are_not_read(folder: Path) -> None:
    with (folder / "graphs/ort-cpu-int4.onnx.data").open("r+b") as opened:
        opened.write(b"\x3f")
    load_backend(Bundle.open(folder), "ort-cpu", "fp32", threads=1)


def test_files_are_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (folder / "graphs").iterdir():
        os.utime(file, ns=(1, 1))
    hashed: list[str] = []
    sha256 = verified_file._sha256
    monkeypatch.setattr(verified_file, "_sha256", lambda file: (hashed.append(file.name), sha256(file))[1])
    monkeypatch.setattr(time, "time_ns", lambda: 1 << 62)  # long after the files were written
    bundle = Bundle.open(folder)
    for _ in range(2):
        load_backend(bundle, "ort-cpu", "fp32", threads=1)
    assert len(hashed) == len(set(hashed))
    assert sum(name.endswith(".data") for name in map(str, hashed)) == 2


def test_weights_are_hashed_while_the_session_is_created(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread waits for the other; the damage is reported once both are done, in place of what it led to."""
    begun = threading.Event()
    sha256 = verified_file._sha256

    def hash_after_session_began(file: Any) -> str:
        assert begun.wait(60)
        return sha256(file)

    def session(*arguments: Any, **options: Any) -> Any:
        begun.set()
        raise RuntimeError("the weights make no sense")

    with (folder / "graphs/shared.data").open("r+b") as opened:
        opened.write(b"\x3f")
    bundle = Bundle.open(folder)
    monkeypatch.setattr(verified_file, "_sha256", hash_after_session_began)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(BundleError, match=r"shared\.data has SHA-256 .*, expected"):
        load_backend(bundle, "ort-cpu", "fp32", threads=1)


def test_weights_written_while_they_are_loaded_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, file = Bundle.open(folder), folder / "graphs/shared.data"
    session = onnxruntime.InferenceSession

    def writing(*arguments, **options):
        with file.open("r+b") as opened:
            opened.write(b"\x3f")
        return session(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", writing)
    # which of the two errors depends on how far the file was hashed
    with pytest.raises(BundleError, match=r"shared\.data (was written while it was loaded|has SHA-256 .*, expected)"):
        load_backend(bundle, "ort-cpu", "fp32", threads=1)


def test_a_file_touched_but_the_same_is_loaded(folder: Path) -> None:
    bundle = Bundle.open(folder)
    for file in (folder / "graphs").iterdir():
        shutil.copy(file, file.with_name("copy"))
        file.with_name("copy").replace(file)
    load_backend(bundle, "ort-cpu", "fp32", threads=1)


def test_a_graph_with_other_inputs_or_outputs(folder: Path) -> None:
    graph = folder / "graphs/ort-cpu-fp32.onnx"
    original = graph.read_bytes()
    changes = {
        r"lacks the output 'hidden'": lambda g: g.output.remove(next(one for one in g.output if one.name == "hidden")),
        r"has the input 'extra'": lambda g: g.input.append(helper.make_tensor_value_info("extra", 1, [1])),
    }
    for message, change in changes.items():
        made = onnx.load_from_string(original)
        change(made.graph)
        graph.write_bytes(made.SerializeToString())
        with pytest.raises(BundleError, match=message):
            load_backend(Bundle.open(resealed(folder)), "ort-cpu", "fp32", threads=1)


def test_a_graph_of_another_models_sizes(tiny_precisions: Path) -> None:
    bundle = Bundle.open(tiny_precisions)
    path = bundle.graph("ort-cpu", "fp32")[1]
    for changed, message in (
        ({"vocab_size": 301}, r"output 'logits' is a tensor\(float\) of .*300\], expected a .*301\]"),
        ({"head_dim": 8}, r"input 'past_key_0' is a tensor\(float\) of .*16\], expected a .*8\]"),
    ):
        with pytest.raises(BundleError, match=message):
            OrtCpuBackend(path, replace(bundle.model, **changed), bundle.heads, threads=1)


def test_onnx_runtimes_own_format_is_refused(tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "graph.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    x, y = (helper.make_tensor_value_info(name, 1, [1]) for name in "xy")
    plain = helper.make_model(
        helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "g", [x], [y]),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    onnxruntime.InferenceSession(plain.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (tmp_path / "plain.onnx").write_bytes(plain.SerializeToString())
    source = CheckedGraph(tmp_path / "plain.onnx")
    source.data = (tmp_path / "graph.ort").read_bytes()  # as if they had passed for an ONNX file
    with pytest.raises(BundleError, match="cannot load"):
        open_session(onnxruntime, source, onnxruntime.SessionOptions(), ["CPUExecutionProvider"])
