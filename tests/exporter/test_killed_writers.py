"""Whatever ends a writer, at any access, leaves the old file or the new one, and the next run is not hindered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from medusa_exporter import output_kinds
from medusa_exporter.compare import reference_file
from medusa_exporter.distillation import checkpoint as batch_checkpoint
from medusa_exporter.distillation import review
from medusa_exporter.distillation.dataset import DataFacts, from_rows, load_data, save_data
from medusa_exporter.distillation.scripts import GeneratedRow
from medusa_exporter.files import write_json
from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.heads.storage import load_heads, save_heads
from medusa_exporter.output_kinds import CHECKPOINT
from medusa_exporter.overwrite_check import check_output_file, check_output_folder
from medusa_exporter.report import page
from medusa_exporter.training import checkpoint, report
from medusa_profiles.profile import TreeProfile
from medusa_runtime.facts import HeadFacts, ModelFacts

from .crash import cuts

FACTS = DataFacts("tiny", "digest", 256, (1,), 0, {})
EXTRAS = {"base_model_name_or_path": "tiny", "vocab_size": 300}
SIDE = reference_file.Side("ort-cpu", "fp32")
BUNDLE = SimpleNamespace(
    model=ModelFacts("tiny", "llama", 2, 64, 4, 2, 16, 300, 512, (2,)), heads=HeadFacts(3, 1, "none", 10)
)
PLAN = SimpleNamespace(tree=TreeProfile("tree-2", ((0,),)), prompts=((1, 2),), steps=1)


def data(value: int) -> Any:
    tokens = np.full(6, value, np.int64)
    return from_rows(FACTS, [(tokens, tokens > 0, 0.0, value)])


def save_reference(file: Path, value: int) -> None:
    with reference_file.write_reference(file, BUNDLE, SIDE, PLAN) as writer:  # type: ignore[arg-type]
        writer.add({"tokens": np.full((1, 2), value, np.int32)})


def write_review(file: Path, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [(number, ({"role": "user", "content": str(value)},)) for number in range(3)]
    monkeypatch.setattr(review, "_all_messages", lambda *_arguments: iter(said))
    review.write_review(data(1), None, file)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


FILES: dict[str, tuple[Any, Callable[[Path, int, Any], object]]] = {
    "json": (output_kinds.BENCH, lambda file, value, _: write_json(file, output_kinds.BENCH.marked({"value": value}))),
    "reference": (output_kinds.REFERENCE, lambda file, value, _: save_reference(file, value)),
    "review": (None, write_review),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("first", [False, True])
def test_a_file(tmp_path: Path, name: str, first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, write = FILES[name]
    place = tmp_path / "place" / "out"
    write(place, 2, monkeypatch)
    new = place.read_bytes()
    write(place, 1, monkeypatch)
    old, seen = place.read_bytes(), set()
    assert old != new
    if first:
        shutil.rmtree(place.parent)
    for _number in cuts(lambda: write(place, 2, monkeypatch)):
        seen.add(place.read_bytes() if place.exists() else None)
        if kind is not None:
            check_output_file(place, kind)
        write(place, 2, monkeypatch)
        assert files(tmp_path) == {"place/out": new}
        shutil.rmtree(place.parent)
        if not first:
            write(place, 1, monkeypatch)
    assert seen <= {None if first else old, new}
    assert (None if first else old) in seen


def heads(folder: Path, value: int) -> None:
    made = MedusaHeads(8, 2, 1, "none")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(value)
    facts = {"command": "train", "settings": {}, "data": {}, "steps": value}
    save_heads(made, folder, {**EXTRAS, "value": value}, others={"training.json": facts})


def read_heads(folder: Path) -> tuple[int, ...]:
    weights = load_heads(folder, 8, 300).weights[0]
    config, training = (json.loads((folder / name).read_text()) for name in ("config.json", "training.json"))
    return int(weights.flatten()[0]), config["value"], training["steps"]


def read_data(folder: Path) -> tuple[int, ...]:
    found = load_data(folder)
    return int(found.tokens[0]), int(found.tokens[-1]), int(found.groups[0])


FOLDERS = {
    "heads": (output_kinds.TRAINING, heads, read_heads),
    "data": (output_kinds.DATA, lambda folder, value: save_data(data(value), folder), read_data),
}


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("first", [False, True])
def test_a_folder_of_files_that_belong_together(tmp_path: Path, name: str, first: bool) -> None:
    kinds, write, read = FOLDERS[name]
    place, seen = tmp_path / "out", set()
    write(place, 2)
    new = files(place)
    write(place, 1)
    if first:
        shutil.rmtree(place)
    for _number in cuts(lambda: write(place, 2)):
        check_output_folder(place, kinds)
        if not first or any(path.is_file() and path.parent == place for path in place.rglob("*")):
            seen.add(read(place))
        write(place, 2)
        assert files(place) == new
        assert not [path for path in place.rglob("*") if path.is_dir()]
        shutil.rmtree(place)
        if not first:
            write(place, 1)
    assert seen == ({(2, 2, 2)} if first else {(1, 1, 1), (2, 2, 2)})


@pytest.mark.parametrize("first", [False, True])
def test_a_checkpoint(tmp_path: Path, first: bool) -> None:
    model = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimiser.step()

    def save(step: int) -> None:
        checkpoint.save(tmp_path, checkpoint.TrainingProgress(step, 9, 1, 0.0), {"model": "tiny"}, model, optimiser)

    def load() -> int:
        return checkpoint.load(tmp_path, {"model": "tiny"}, torch.nn.Linear(2, 2), optimiser).step

    def restore() -> None:
        checkpoint.remove(tmp_path)
        if not first:
            save(1)

    seen: set[int | None] = set()
    restore()
    for _number in cuts(lambda: save(2)):
        check_output_folder(tmp_path, output_kinds.TRAINING)
        if first and not any((path / "state.json").is_file() for path in tmp_path.iterdir()):
            seen.add(None)
        else:
            seen.add(load())
        save(3)
        assert load() == 3
        assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
        restore()
    assert seen == ({None, 2} if first else {1, 2})


def test_batches_and_the_plan_of_a_distillation(tmp_path: Path) -> None:
    lines = [GeneratedRow(np.array([1, 2, 3]), np.array([0, 1, 1]))]

    def work() -> None:
        folder = batch_checkpoint.open_checkpoint(tmp_path / "out", FACTS)
        if not batch_checkpoint.is_saved(folder, 0):
            batch_checkpoint.save_batch(folder, 0, lines)

    for _number in cuts(work):
        check_output_folder(tmp_path / "out", output_kinds.DATA)
        work()
        assert sorted(files(tmp_path)) == ["out/partial/batch-00000.npz", "out/partial/plan.json"]
        assert batch_checkpoint.load_batch(tmp_path / "out" / "partial", 0)[0].tokens.tolist() == [1, 2, 3]
        shutil.rmtree(tmp_path / "out")


def test_a_distillation_that_was_removing_its_unfinished_work(tmp_path: Path) -> None:
    folder = batch_checkpoint.open_checkpoint(tmp_path / "out", FACTS)
    batch_checkpoint.save_batch(folder, 0, [GeneratedRow(np.array([1, 2, 3]), np.array([0, 1, 1]))])
    save_data(data(1), tmp_path / "out")
    left = {"plan.json", "batch-00000.npz"}
    for gone in (set(), {"plan.json"}, {"batch-00000.npz"}, left):
        for name in gone:
            (folder / name).unlink(missing_ok=True)
        check_output_folder(tmp_path / "out", output_kinds.DATA)
        assert output_kinds.DATA["partial"].is_ours(folder)


def test_trees_of_heads_report(tmp_path: Path) -> None:
    def trees(value: int) -> dict[int, TreeProfile]:
        source = f"{output_kinds.FITTED}tiny by heads {value}"
        return {nodes: TreeProfile(f"tree-{nodes}", ((0,), (1,)), source) for nodes in (2, 4)}

    kinds = {f"tree-{nodes}.toml": output_kinds.TREE for nodes in report.SIZES}
    report.write_profiles(trees(2), tmp_path)
    new = files(tmp_path)
    report.write_profiles(trees(1), tmp_path)
    old = files(tmp_path)
    for _number in cuts(lambda: report.write_profiles(trees(2), tmp_path)):
        for name in new:
            assert files(tmp_path)[name] in (old[name], new[name])
        check_output_folder(tmp_path, kinds)
        report.write_profiles(trees(2), tmp_path)
        assert files(tmp_path) == new
        report.write_profiles(trees(1), tmp_path)


def test_the_page_and_the_mark_by_which_it_is_known(tmp_path: Path) -> None:
    assert output_kinds.GENERATOR in Path(page.__file__).with_name("page.html.jinja").read_text()
    (tmp_path / "out.html").write_text(f"<!DOCTYPE html>{output_kinds.GENERATOR}")
    check_output_file(tmp_path / "out.html", output_kinds.REPORT)
