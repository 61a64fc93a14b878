"""A reference file returns what was saved; a damaged, foreign or hostile one is refused in one sentence."""

from __future__ import annotations

import dataclasses
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from medusa_exporter.compare.reference_file import ReferenceFileError, Side, open_reference, write_reference
from medusa_exporter.compare.steps import BackendRunner, ComparisonPlan, run_steps
from medusa_exporter.output_kinds import REFERENCE
from medusa_exporter.overwrite_check import OverwriteError, check_output_file
from medusa_runtime.backends import load_backend
from medusa_runtime.bundle import Bundle
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import MissingExtraError
from safetensors import safe_open

PROMPT = tuple(range(3, 20))
Content = tuple[dict[str, np.ndarray], dict[str, str]]  # tensors and metadata


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def plan(bundle: Bundle) -> ComparisonPlan:
    return ComparisonPlan((PROMPT, PROMPT[:5]), bundle.profile("tree-4"), 2, ())


@pytest.fixture(scope="module")
def steps(bundle: Bundle, plan: ComparisonPlan) -> list[dict[str, np.ndarray]]:
    runner = BackendRunner(Decoder(load_backend(bundle, threads=1)), plan)
    return [step.outputs for step in run_steps(runner, plan, bundle.heads.top_k)]


@pytest.fixture(scope="module")
def sound(bundle: Bundle, plan: ComparisonPlan, steps: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("references") / "sound"
    with write_reference(file, bundle, Side("ort-cpu", "fp32"), plan) as writer:
        for outputs in steps:
            writer.add(outputs)
    return file


@pytest.fixture
def changed(sound: Path, tmp_path: Path) -> Callable[..., Path]:
    """The reference file with its tensors or its metadata changed, written by safetensors itself."""

    def change(work: Callable[[Content], object]) -> Path:
        with safe_open(sound, framework="numpy") as file:
            content: Content = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        work(content)
        safetensors.numpy.save_file(content[0], tmp_path / "changed", metadata=content[1])
        return tmp_path / "changed"

    return change


def reference(work: Callable[[dict[str, Any]], object]) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        facts = json.loads(content[1]["reference"])
        work(facts)
        content[1]["reference"] = json.dumps(facts)

    return change


def metadata(**texts: str) -> Callable[[Content], None]:
    return lambda content: content[1].update(texts)


def tensor(name: str, made: Callable[[np.ndarray], np.ndarray]) -> Callable[[Content], None]:
    return lambda content: content[0].update({name: np.ascontiguousarray(made(content[0][name]))})


def header(data: bytes, work: Callable[[dict[str, Any]], object]) -> bytes:
    """The file with its header changed and its tensors as they are."""
    size = int.from_bytes(data[:8], "little")
    content = json.loads(data[8 : 8 + size])
    work(content)
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def read(file: Path, bundle: Bundle) -> list[dict[str, np.ndarray]]:
    with open_reference(file, bundle) as saved:
        found = [step.outputs for step in run_steps(saved, saved.plan, bundle.heads.top_k)]
        saved.finish()
    return found


def test_what_was_saved_comes_back(sound: Path, bundle: Bundle, plan: ComparisonPlan, steps: Any) -> None:
    with open_reference(sound, bundle) as saved:
        assert (str(saved.side), saved.plan.prompts) == ("ort-cpu:fp32", plan.prompts)
        assert (saved.plan.tree.paths, saved.plan.steps) == (plan.tree.paths, plan.steps)
    found = read(sound, bundle)
    assert len(found) == len(steps) == 10
    for expected, got in zip(steps, found, strict=True):
        assert list(got) == list(expected)
        for name, one in expected.items():
            assert (got[name].dtype, got[name].shape) == (one.dtype, one.shape)
            np.testing.assert_array_equal(got[name], one)
    with safe_open(sound, framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("00000/logits"), steps[0]["logits"])
    assert int.from_bytes(sound.read_bytes()[:8], "little") % 8 == 0  # tensors begin at a multiple of 8


def test_the_same_outputs_are_the_same_file(
    sound: Path, bundle: Bundle, plan: ComparisonPlan, steps: Any, tmp_path: Path
) -> None:
    with write_reference(tmp_path / "again", bundle, Side("ort-cpu", "fp32"), plan) as writer:
        for outputs in steps:
            writer.add(outputs)
    assert (tmp_path / "again").read_bytes() == sound.read_bytes()


def test_nothing_appears_where_saving_breaks_off(
    bundle: Bundle, plan: ComparisonPlan, steps: Any, tmp_path: Path
) -> None:
    with pytest.raises(KeyError), write_reference(tmp_path / "file", bundle, Side("ort-cpu", "fp32"), plan) as writer:
        writer.add(steps[0])
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (metadata(format="other"), "its format is 'other', expected 'medusa-export reference 2'; save it again"),
        (metadata(format="medusa-export reference 3"), "its format is 'medusa-export reference 3', expected"),
        (lambda c: c[1].clear(), "its format is None, expected"),
        (reference(lambda c: c["model"].update(layers=3)), "to another model: model.layers is 3 there and 2 in"),
        (reference(lambda c: c["heads"].pop("layers")), "to another model: heads.layers is None there and 1 in"),
        (reference(lambda c: c.update(model=7)), "model is 7, expected an object"),
        (reference(lambda c: c.pop("tree")), "it lacks 'tree'"),
        (reference(lambda c: c.update(backend="abacus")), "its backend is 'abacus', expected one of ort-cpu, "),
        (reference(lambda c: c.update(backend=[])), "is not a complete reference file"),
        (reference(lambda c: c.update(precision="fp8")), "no tolerance for precision 'fp8'"),
        (reference(lambda c: c["tree"].update(paths=[[0, 0]])), r"path \[0, 0\] has no parent"),
        (reference(lambda c: c["tree"].update(paths=[[0] * n for n in range(1, 8)])), "the bundle has 5 heads"),
        (reference(lambda c: c.update(prompts=[])), "it has no prompts"),
        (reference(lambda c: c.update(prompts=[[]])), r"a prompt is \[\], expected a list of 1 to 512 token ids"),
        (reference(lambda c: c.update(prompts=[[1, 300]])), "a token of a prompt is 300, expected a whole number"),
        (reference(lambda c: c.update(prompts=[[True]])), "a token of a prompt is True"),
        (reference(lambda c: c.update(prompts=[[1] * 512])), "its steps need 524 tokens, the model's context is 512"),
        (reference(lambda c: c.update(steps=10**9)), "steps is 1000000000, expected a whole number from 1 to 512"),
        (reference(lambda c: c.update(steps=3)), "of shape"),
        (reference(lambda c: c.update(steps=1)), "of shape"),
        (metadata(reference="[1, 2"), "is not a complete reference file"),
        (metadata(reference="[1, 2]"), "its metadata is .*, expected an object"),
        (metadata(reference="[" * 100_000), "is not a complete reference file"),
        (lambda c: c[1].pop("reference"), "it lacks 'reference'"),
        (lambda c: c[0].pop("00003/new_key_1"), "it lacks '00003/new_key_1'"),
        (lambda c: c[0].update(more=np.zeros(1, np.int8)), "has 81 tensors, expected 80 for its steps"),
        (tensor("00000/hidden", lambda a: a.astype(np.float64)), r"hidden is F64 of shape \(1, 17, 64\), expected F32"),
        (tensor("00000/tokens", lambda a: a.view(np.float32)), r"00000/tokens is F32 of shape \(1, 17\), expected I32"),
        (tensor("00000/hidden", lambda a: a[:, :-1]), r"of shape \(1, 16, 64\), expected F32 of shape \(1, 17"),
        (tensor("00000/logits", lambda a: np.zeros((1, 10**6), np.float32)), r"of shape \(1, 1000000\), expected F32"),
        (tensor("00002/tokens", lambda a: a + 300), "00002/tokens has ids outside the vocabulary"),
        (tensor("00002/argmax", lambda a: a - 300), "00002/argmax has ids outside the vocabulary"),
        (tensor("00000/tokens", lambda a: a + 1), "00000/tokens differs from the tokens of that step"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_reported(
    changed: Any, bundle: Bundle, change: Callable[[Content], object], message: str
) -> None:
    with pytest.raises(ReferenceFileError, match=message) as error:
        read(changed(change), bundle)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "work",
    [
        lambda c: c["00000/logits"]["data_offsets"].__setitem__(1, 2**60),
        lambda c: c["00000/logits"]["data_offsets"].__setitem__(0, -8),
        lambda c: c["00000/logits"].update(data_offsets=c["00000/hidden"]["data_offsets"]),  # two tensors, one place
        lambda c: c["00000/logits"].update(shape=[2**40, 2**40]),
        lambda c: c["00000/logits"].update(shape=[]),
        lambda c: c["00000/logits"].update(dtype="O"),
        lambda c: c["00000/logits"].update(dtype="BF16"),
        lambda c: c.update(__metadata__=[]),
        lambda c: c["__metadata__"].update(format=2),
    ],
)
def test_a_header_that_does_not_fit_its_tensors_is_refused(
    sound: Path, bundle: Bundle, tmp_path: Path, work: Callable[[dict[str, Any]], object]
) -> None:
    (tmp_path / "hostile").write_bytes(header(sound.read_bytes(), work))
    with pytest.raises(ReferenceFileError, match=r"hostile is not a complete reference file: .*; save it again"):
        read(tmp_path / "hostile", bundle)


def test_a_truncated_or_foreign_file_is_refused(sound: Path, bundle: Bundle, tmp_path: Path) -> None:
    data, file = sound.read_bytes(), tmp_path / "damaged"
    huge = (2**62).to_bytes(8, "little")
    for damaged in (
        b"",
        data[:5],
        data[:100],
        data[: len(data) // 2],
        data[:-10],
        data + b"1234",
        b"x" * 99,
        huge + data,
    ):
        file.write_bytes(damaged)
        with pytest.raises(ReferenceFileError, match=r"damaged is not a complete reference file: .*; save it again"):
            read(file, bundle)
    with pytest.raises(ReferenceFileError, match=r"nowhere is not a complete reference file: .*No such file"):
        read(tmp_path / "nowhere", bundle)


def test_a_file_of_the_former_format_is_to_be_saved_again(bundle: Bundle, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old", "w") as archive:
        archive.writestr("header.json", '{"format": "medusa-export recording", "schema": 1}')
    with pytest.raises(ReferenceFileError, match=r"old .* is a ZIP archive of an earlier version.*; save it again"):
        read(tmp_path / "old", bundle)
    check_output_file(tmp_path / "old", REFERENCE)  # which --save may do in the same place


def test_only_reference_files_are_replaced(sound: Path, tmp_path: Path) -> None:
    check_output_file(sound, REFERENCE)
    safetensors.numpy.save_file({"a": np.zeros(1)}, tmp_path / "weights")
    with pytest.raises(OverwriteError, match="not written by medusa-export compare --save"):
        check_output_file(tmp_path / "weights", REFERENCE)


def test_without_safetensors_the_pip_command_is_named(
    sound: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'medusa-export\[export\]'"):
        read(sound, bundle)


def test_a_reference_of_another_model_is_refused(sound: Path, tiny_precisions: Path, bundle: Bundle) -> None:
    read(sound, Bundle.open(tiny_precisions))  # of the same model and heads, with other trees
    model = dataclasses.replace(bundle.model, family="mistral", name="other")
    other = Bundle(bundle.root, dataclasses.replace(bundle.manifest, model=model, digest=""))
    with pytest.raises(ReferenceFileError, match=r"model\.family is 'llama' there and 'mistral' in"):
        read(sound, other)
