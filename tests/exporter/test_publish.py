"""A bundle comes to its place whole, by one command at a time, over nothing else, and whatever ends the command."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from medusa_exporter import build as building
from medusa_exporter import folder_swap, publish
from medusa_exporter.build import build
from medusa_exporter.bundle_writer import BuildPlan
from medusa_exporter.publish import check_target, lock_bundle, replace_bundle
from medusa_runtime.bundle import Bundle, write_manifest
from medusa_runtime.errors import BundleError
from medusa_runtime.facts import GraphFacts, HeadFacts, ModelFacts
from medusa_runtime.manifest import Manifest

from .crash import cuts, hidden

MODEL = ModelFacts("tiny", "llama", 2, 64, 4, 2, 16, 300, 512, (2,))
FACTS = {
    "producer": {"medusa-export": "0"},
    "model": MODEL,
    "heads": HeadFacts(3, 1, "none", 10),
    "graphs": {"ort-cpu-fp32": GraphFacts("ort-cpu", "fp32", "graphs/ort-cpu-fp32.onnx")},
    "profiles": ["chain"],
}
CONTENT = {
    "graphs/ort-cpu-fp32.onnx": b"graph",
    "graphs/shared.data": b"weights",
    "profiles/chain.toml": b'name = "chain"\npaths = [[0], [0, 0], [0, 0, 0]]\n',
    "tokenizer/tokenizer.json": b"{}",
}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def sealed(folder: Path, sources: dict[str, Any]) -> Manifest:
    """Put a small bundle into `folder`, whose graph and weights are no real ones."""
    for name, data in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return write_manifest(folder, **FACTS, sources=sources)


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle to be replaced, or copied."""
    folder = tmp_path_factory.mktemp("small") / "content"
    sealed(folder, {"made": "before"})
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model's folder, of which only the config is read."""
    import onnxscript  # noqa: F401 -- before children are forked, each of which would import it

    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> str:
    from medusa_exporter.heads.modules import MedusaHeads
    from medusa_exporter.heads.storage import save_heads

    folder = tmp_path_factory.mktemp("heads")
    save_heads(MedusaHeads(64, 3, 1, "none"), folder, {"vocab_size": 300})
    return str(folder)


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds write the small bundle again, with their own sources, in place of minutes of work."""

    def write_small(folder: Path, plan: BuildPlan, *_arguments: object) -> Manifest:
        return sealed(folder, plan.sources)

    monkeypatch.setattr(building, "write_bundle", write_small)


@pytest.mark.parametrize("swaps", [True, False])
def test_a_build_killed_at_any_access_leaves_a_bundle_and_the_next_one_succeeds(
    small: Path, filled: None, model: str, heads: str, tmp_path: Path, monkeypatch: Any, swaps: bool
) -> None:
    if not swaps:  # as on a network's file system
        monkeypatch.setattr(folder_swap, "_swap", lambda *_paths: False)
    bundle, seen = tmp_path / "bundle", set()

    def run() -> None:
        build(model, heads, bundle)

    shutil.copytree(small, bundle)
    for _number in cuts(run):
        if not swaps and not bundle.exists():  # between two renames; any next command brings it back
            seen.add("none")
            with lock_bundle(bundle):
                pass
        made = Bundle.open(bundle, weights=True).manifest.sources.get("made", "after")
        seen.add(made)
        run()
        assert Bundle.open(bundle, weights=True).manifest.sources.keys() >= {"model", "heads"}
        assert hidden(tmp_path) == []
        shutil.rmtree(bundle)
        shutil.copytree(small, bundle)
    assert seen == ({"before", "after"} if swaps else {"before", "after", "none"})
    assert "made" not in Bundle.open(bundle).manifest.sources


def test_a_first_build_killed_at_any_access_leaves_none_or_a_whole_one(
    filled: None, model: str, heads: str, tmp_path: Path
) -> None:
    bundle = tmp_path / "deep" / "bundle"

    def run() -> None:
        build(model, heads, bundle)

    for _number in cuts(run):
        if bundle.exists():
            Bundle.open(bundle, weights=True)
        run()
        Bundle.open(bundle, weights=True)
        assert hidden(bundle.parent) == []
        shutil.rmtree(bundle.parent)


def test_sealing_a_bundle_again_leaves_it_open_to_readers_wherever_it_ends(small: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(small, tmp_path / "bundle"))

    def run() -> None:
        write_manifest(bundle, **FACTS, sources={"made": "after"})

    for _number in cuts(run):
        Bundle.open(bundle, weights=True)
    run()
    assert Bundle.open(bundle, weights=True).manifest.sources == {"made": "after"}
    assert hidden(bundle) == []


def test_folders_of_the_user_with_names_like_ours_stay(filled: None, model: str, heads: str, tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    theirs = [f".bundle.backup-{dead.pid}", f".bundle.building-{dead.pid}", ".bundle.new", ".bundle.old-123"]
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years")
    build(model, heads, tmp_path / "bundle")
    assert hidden(tmp_path) == sorted(theirs)
    assert all((tmp_path / name / "thesis.txt").read_text() == "years" for name in theirs)


def test_a_staging_folder_that_holds_something_of_the_users_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".bundle.medusa-export").mkdir()
    (tmp_path / ".bundle.medusa-export" / "thesis.txt").write_text("years")
    with pytest.raises(BundleError, match=r"it holds 'thesis\.txt'; move that away"), lock_bundle(tmp_path / "bundle"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == [".bundle.medusa-export", "thesis.txt"]


def test_a_second_command_waits_for_the_first(
    small: Path, filled: None, model: str, heads: str, tmp_path: Path
) -> None:
    bundle, lines, results = tmp_path / "bundle", [], []
    waiting = threading.Event()

    def report(line: str) -> None:
        lines.append(line)
        waiting.set()

    def second() -> None:
        results.append(build(model, heads, bundle, report=report))

    with lock_bundle(bundle) as staging:
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(30)
        assert lines == [f"another command works on {bundle}; wait until it has ended"]
        assert not bundle.exists()
        with replace_bundle(staging) as folder:
            sealed(folder, {})
    thread.join(30)
    assert results[0].built
    assert hidden(tmp_path) == []
    assert not build(model, heads, bundle).built


def test_what_a_waiting_build_was_to_make_is_not_made_twice(
    small: Path, filled: None, model: str, heads: str, tmp_path: Path
) -> None:
    bundle, other, results = tmp_path / "bundle", tmp_path / "other", []
    build(model, heads, other)
    waiting = threading.Event()

    def second() -> None:
        results.append(build(model, heads, bundle, report=lambda _line: waiting.set()))

    with lock_bundle(bundle) as staging:
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(30)
        with replace_bundle(staging) as folder:
            shutil.copytree(other, folder, dirs_exist_ok=True)
    thread.join(30)
    assert not results[0].built


def test_files_that_were_put_into_a_bundle_are_not_lost(
    small: Path, filled: None, model: str, heads: str, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(small, tmp_path / "bundle"))
    (bundle / "notes.txt").write_text("years")
    with pytest.raises(BundleError, match=r"holds 'notes\.txt', which is not part of the bundle there.*move it away"):
        build(model, heads, bundle, force=True)
    assert (bundle / "notes.txt").read_text() == "years"
    (bundle / "notes.txt").rename(bundle / "README.md")
    (bundle / ".cache" / "huggingface").mkdir(parents=True)
    (bundle / ".cache" / "huggingface" / "x.metadata").write_text("x")
    assert build(model, heads, bundle, force=True).built
    assert (bundle / "README.md").read_text() == "years"
    assert (bundle / ".cache" / "huggingface" / "x.metadata").read_text() == "x"
    Bundle.open(bundle)


def test_no_bundle_is_put_into_another(small: Path, tmp_path: Path) -> None:
    outer = Path(shutil.copytree(small, tmp_path / "outer"))
    for place in (outer / "inner", outer / "graphs" / "deep" / "inner"):
        with pytest.raises(BundleError, match=r"inner is inside of the bundle .*outer, which must hold no other files"):
            check_target(place)
    check_target(outer)


def test_a_folder_with_somebody_elses_manifest_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "a browser's extension", "manifest_version": 3}))
    with pytest.raises(BundleError, match="other things in it, not a bundle"):
        check_target(tmp_path)


def test_a_bundle_of_an_older_schema_may_be_replaced(small: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(small, tmp_path / "bundle"))
    content = json.loads((bundle / "manifest.json").read_text()) | {"schema": 1}
    (bundle / "manifest.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    with pytest.raises(BundleError, match="schema 1"):
        Bundle.open(bundle)
    check_target(bundle)


def test_a_bundle_that_cannot_be_renamed_is_refused_before_any_work(
    small: Path, model: str, heads: str, tmp_path: Path, monkeypatch: Any
) -> None:
    bundle, rename = Path(shutil.copytree(small, tmp_path / "bundle")), Path.rename

    def forbidden(path: Path, target: Path) -> Path:
        if path == bundle:  # the kernel asks this before it looks at the target
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", forbidden)
    monkeypatch.setattr(building, "write_bundle", lambda *_arguments: pytest.fail("worked for minutes"))
    with pytest.raises(BundleError, match=r"no bundle can be put at .*: Operation not permitted; give"):
        build(model, heads, bundle, force=True)
    monkeypatch.undo()
    Bundle.open(bundle)
    assert hidden(tmp_path) == []


def test_the_probe_moves_nothing(small: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(small, tmp_path / "bundle"))
    (tmp_path / "empty").mkdir()
    for place in (bundle, tmp_path / "empty", tmp_path / "none"):
        before = sorted(tmp_path.rglob("*"))
        with lock_bundle(place):
            assert {path for path in tmp_path.rglob("*") if "medusa-export" not in path.name} == set(before)
        assert sorted(tmp_path.rglob("*")) == before
    Bundle.open(bundle)


def test_a_place_where_nothing_can_be_written_is_refused_before_any_work(
    model: str, heads: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(building, "write_bundle", lambda *_arguments: pytest.fail("worked for minutes"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match=r"no bundle can be put at .*file/deep/bundle: .*; give another place"):
        build(model, heads, tmp_path / "file" / "deep" / "bundle")
    with pytest.raises(BundleError, match="no bundle can be put at"):
        build(model, heads, Path("/proc/bundle"))
    with pytest.raises(BundleError, match="no bundle can be put at"):
        build(model, heads, tmp_path / ("n" * 250))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_link_to_a_place_elsewhere_stays_a_link(
    small: Path, filled: None, model: str, heads: str, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    bundle = tmp_path / "here" / "bundle"
    bundle.symlink_to(tmp_path / "there" / "real")
    for force in (False, True):
        assert build(model, heads, bundle, force=force).built
        assert bundle.is_symlink()
        Bundle.open(bundle)
        assert [path.name for path in (tmp_path / "here").iterdir()] == ["bundle"]
        assert [path.name for path in (tmp_path / "there").iterdir()] == ["real"]


def test_an_error_while_a_bundle_is_placed_leaves_the_old_one(small: Path, tmp_path: Path, monkeypatch: Any) -> None:
    bundle, rename = Path(shutil.copytree(small, tmp_path / "bundle")), Path.rename
    monkeypatch.setattr(folder_swap, "_swap", lambda *_paths: False)

    def failing(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(errno.EIO, "broken", str(path))
        return rename(path, target)

    with lock_bundle(bundle) as staging:
        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="broken"), replace_bundle(staging) as folder:
            sealed(folder, {})
        monkeypatch.undo()
    assert Bundle.open(bundle).manifest.sources == {"made": "before"}
    assert hidden(tmp_path) == []
    assert publish.Staging(bundle).target == bundle
