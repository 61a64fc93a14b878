"""A recording gives back what was put in, and a damaged, foreign or hostile one is refused in one sentence."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from medusa_exporter.compare.reference_file import ReferenceFileError, Side, open_reference, write_reference
from medusa_exporter.compare.steps import Plan, StepRunner, run_steps
from medusa_runtime import Engine
from medusa_runtime.bundle import Bundle

PROMPT = tuple(range(3, 20))
Entries = dict[str, bytes]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def plan(bundle: Bundle) -> Plan:
    return Plan((PROMPT, PROMPT[:5]), bundle.profile("tree-4"), 2, ())


@pytest.fixture(scope="module")
def steps(bundle: Bundle, plan: Plan) -> list[dict[str, np.ndarray]]:
    runner = StepRunner(Engine.load(bundle.root, profile="plain", threads=1).decoder, plan)
    return [taken.outputs for taken in run_steps(runner, plan, bundle.heads.top_k)]


@pytest.fixture(scope="module")
def sound(bundle: Bundle, plan: Plan, steps: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recordings") / "sound"
    with write_reference(file, bundle, Side("ort-cpu", "fp32"), plan) as recorder:
        for outputs in steps:
            recorder.add(outputs)
    return file


@pytest.fixture
def changed(sound: Path, tmp_path: Path) -> Callable[..., Path]:
    """The recording with its entries changed."""

    def change(work: Callable[[Entries], object], compression: int = zipfile.ZIP_STORED) -> Path:
        with zipfile.ZipFile(sound) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        work(entries)
        file = tmp_path / "changed"
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
        return file

    return change


def header(work: Callable[[dict[str, Any]], object]) -> Callable[[Entries], None]:
    def change(entries: Entries) -> None:
        content = json.loads(entries["header.json"])
        work(content)
        entries["header.json"] = json.dumps(content).encode()

    return change


def array(name: str, made: Callable[[np.ndarray], np.ndarray]) -> Callable[[Entries], None]:
    def change(entries: Entries) -> None:
        stream = io.BytesIO()
        np.save(stream, made(np.load(io.BytesIO(entries[name]))))
        entries[name] = stream.getvalue()

    return change


def read(file: Path, bundle: Bundle) -> list[dict[str, np.ndarray]]:
    with open_reference(file, bundle) as recording:
        found = [taken.outputs for taken in run_steps(recording, recording.plan, bundle.heads.top_k)]
        recording.finish()
    return found


def test_what_was_recorded_comes_back(sound: Path, bundle: Bundle, plan: Plan, steps: Any) -> None:
    with open_reference(sound, bundle) as recording:
        assert (str(recording.side), recording.plan.prompts) == ("ort-cpu:fp32", plan.prompts)
        assert (recording.plan.tree.paths, recording.plan.steps) == (plan.tree.paths, plan.steps)
    found = read(sound, bundle)
    assert len(found) == len(steps) == 10
    for expected, got in zip(steps, found, strict=True):
        assert list(got) == list(expected)
        for name, one in expected.items():
            assert (got[name].dtype, got[name].shape) == (one.dtype, one.shape)
            np.testing.assert_array_equal(got[name], one)
    with np.load(sound) as entries:
        np.testing.assert_array_equal(entries["00000/logits"], steps[0]["logits"])


def test_the_same_outputs_are_the_same_file(
    sound: Path, bundle: Bundle, plan: Plan, steps: Any, tmp_path: Path
) -> None:
    with write_reference(tmp_path / "again", bundle, Side("ort-cpu", "fp32"), plan) as recorder:
        for outputs in steps:
            recorder.add(outputs)
    assert (tmp_path / "again").read_bytes() == sound.read_bytes()


def test_nothing_appears_where_recording_breaks_off(bundle: Bundle, plan: Plan, steps: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyError), write_reference(tmp_path / "file", bundle, Side("ort-cpu", "fp32"), plan) as recorder:
        recorder.add(steps[0])
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (header(lambda c: c.update(format="other")), "expected a header of 'medusa-export recording', schema 1"),
        (header(lambda c: c.update(schema=2)), "expected a header"),
        (header(lambda c: c["model"].update(layers=3)), "of another bundle: model.layers is 3 there and 2 in"),
        (header(lambda c: c["heads"].pop("layers")), "of another bundle: heads.layers is None there and 1 in"),
        (header(lambda c: c.update(model=7)), "is no whole recording"),
        (header(lambda c: c.pop("tree")), "it lacks 'tree'"),
        (header(lambda c: c.update(backend="abacus")), "its backend is 'abacus', expected one of ort-cpu, "),
        (header(lambda c: c.update(backend=[])), "is no whole recording"),
        (header(lambda c: c.update(precision="fp8")), "no tolerance for precision 'fp8'"),
        (header(lambda c: c["tree"].update(paths=[[0, 0]])), r"path \[0, 0\] has no parent"),
        (header(lambda c: c["tree"].update(paths=[[0] * n for n in range(1, 8)])), "the bundle has 5 heads"),
        (header(lambda c: c.update(prompts=[])), "it has no prompts"),
        (header(lambda c: c.update(prompts=[[]])), r"a prompt is \[\], expected a list of 1 to 512 token ids"),
        (header(lambda c: c.update(prompts=[[1, 300]])), "a token of a prompt is 300, expected a whole number"),
        (header(lambda c: c.update(prompts=[[True]])), "a token of a prompt is True"),
        (header(lambda c: c.update(prompts=[[1] * 512])), "its steps take 524 tokens, the model's context is 512"),
        (header(lambda c: c.update(steps=10**9)), "steps is 1000000000, expected a whole number from 1 to 512"),
        (header(lambda c: c.update(steps=3)), "of shape"),
        (header(lambda c: c.update(steps=1)), "of shape"),
        (lambda e: e.update({"header.json": b"[1, 2"}), "is no whole recording"),
        (lambda e: e.update({"header.json": b"[" * 100_000}), "is no whole recording"),
        (lambda e: e.pop("header.json"), r"it lacks header\.json"),
        (lambda e: e.pop("00003/new_key_1.npy"), r"it lacks 00003/new_key_1\.npy"),
        (lambda e: e.update({"more": b""}), "entries, expected"),
        (lambda e: e.update({"00000/logits.npy": e["00000/logits.npy"][:-4]}), "is no whole recording"),
        (lambda e: e.update({"00000/logits.npy": e["00000/logits.npy"] + b"1234"}), "is no whole recording"),
        (lambda e: e.update({"00000/logits.npy": bytes(10**6)}), "has 1000000 bytes, expected 5296 at most"),
        (lambda e: e.update({"00000/logits.npy": b"\x93NUMPY\x03\x00" + bytes(100)}), r"another version of \.npy"),
        (array("00000/hidden.npy", lambda a: a.astype(np.float64)[:, :8]), r"hidden\.npy is float64 of shape"),
        (array("00000/hidden.npy", lambda a: a[:, :-1]), r"of shape \(1, 16, 64\), expected float32 of shape \(1, 17"),
        (array("00000/hidden.npy", np.asfortranarray), "is no whole|of shape"),
        (array("00002/tokens.npy", lambda a: a + 300), "tokens.npy holds ids outside the vocabulary"),
        (array("00002/argmax.npy", lambda a: a - 300), "argmax.npy holds ids outside the vocabulary"),
        (array("00000/tokens.npy", lambda a: a + 1), "tokens.npy holds other tokens than the step was given"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(changed: Any, bundle: Bundle, change: Callable[[Entries], object], message: str) -> None:
    with pytest.raises(ReferenceFileError, match=message) as error:
        read(changed(change), bundle)
    assert "\n" not in str(error.value)


def test_nothing_in_it_is_unpickled(changed: Any, bundle: Bundle, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "owned",)

    def plant(entries: Entries) -> None:
        stream = io.BytesIO()
        np.save(stream, np.array([[Hostile()]], object), allow_pickle=True)
        entries["00000/tokens.npy"] = stream.getvalue()
        entries["00000/argmax.npy"] = pickle.dumps(Hostile())

    with pytest.raises(ReferenceFileError, match=r"tokens\.npy is object of shape"):
        read(changed(plant), bundle)
    assert not (tmp_path / "owned").exists()


def test_compressed_entries_which_may_grow_without_bounds_are_refused(changed: Any, bundle: Bundle) -> None:
    with pytest.raises(ReferenceFileError, match=r"header\.json is compressed"):
        read(changed(lambda entries: None, zipfile.ZIP_DEFLATED), bundle)


def test_a_truncated_or_altered_file_is_refused(sound: Path, bundle: Bundle, tmp_path: Path) -> None:
    data, file = sound.read_bytes(), tmp_path / "damaged"
    for damaged in (b"", data[:100], data[: len(data) // 2], data[:-10], data[:30000] + b"?" + data[30001:], b"x" * 99):
        file.write_bytes(damaged)
        with pytest.raises(ReferenceFileError, match=r"damaged is no whole recording: .*; record again with"):
            read(file, bundle)


def test_a_recording_of_another_model_is_refused(sound: Path, tiny_precisions: Path, bundle: Bundle) -> None:
    read(sound, Bundle.open(tiny_precisions))  # of the same model and heads, with other trees
    model = dataclasses.replace(bundle.model, family="mistral", name="other")
    other = Bundle(bundle.root, dataclasses.replace(bundle.manifest, model=model, digest=""))
    with pytest.raises(ReferenceFileError, match=r"model\.family is 'llama' there and 'mistral' in"):
        read(sound, other)
