"""Building: whole or not at all, nothing to do when nothing has changed, refusals before any work."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from medusa_exporter import build as building
from medusa_exporter.build import build, choose_profiles
from medusa_exporter.cli import main
from medusa_exporter.cli.build import command
from medusa_exporter.precisions import FORMATS
from medusa_profiles.profile import ProfileError
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import BundleError, UnsupportedModelError


def left_behind(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir() if path.name.startswith("."))


@pytest.fixture
def copied(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of this test's own, times kept."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def test_the_bundle_opens_and_says_what_went_in(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert bundle.model.family == "llama"
    assert bundle.heads.top_k >= 10
    assert "tree-8" in bundle.manifest.profiles
    assert all(tree.depth <= bundle.heads.count for tree in bundle.profiles().values())
    assert bundle.manifest.producer.keys() >= {"torch", "transformers", "onnx"}
    assert str(tiny_bundle.parent) not in (tiny_bundle / "manifest.json").read_text()


def test_one_bundle_holds_several_precisions(tiny_precisions: Path, tiny_bundle: Path) -> None:
    bundle, alone = Bundle.open(tiny_precisions), Bundle.open(tiny_bundle)
    assert list(bundle.manifest.graphs) == ["ort-cpu-fp32", "ort-cpu-int4", "ort-cpu-int8", "ort-cpu-w8a8"]
    assert list(alone.manifest.graphs) == ["ort-cpu-fp32"]
    assert bundle.graph("ort-cpu")[0].precision == "fp32"
    # trees of four nodes and more are in this bundle; int4 and int8 would get one of two
    assert [facts.profile for facts in bundle.manifest.graphs.values()] == ["tree-4", "plain", "plain", "tree-4"]
    sizes = {name: facts.size for name, facts in bundle.manifest.files.items() if name.startswith("graphs/")}
    assert set(sizes) == {
        "graphs/shared.data",
        *(f"graphs/ort-cpu-{precision}.onnx{end}" for precision in FORMATS for end in ("", ".data")),
    }
    whole = alone.manifest.files["graphs/ort-cpu-fp32.onnx.data"].size
    table = bundle.model.vocab_size * (bundle.model.hidden_size + 4)  # in 8 bits, one block a row; others share it
    assert sizes["graphs/shared.data"] + sizes["graphs/ort-cpu-fp32.onnx.data"] == whole + table  # nothing twice
    assert sizes["graphs/ort-cpu-int4.onnx.data"] < sizes["graphs/ort-cpu-int8.onnx.data"] < whole / 3


def test_another_list_of_precisions_is_another_build(copied: Path, tiny_model: Path, tiny_heads: Path) -> None:
    assert build(str(tiny_model), str(tiny_heads), copied, precisions=("fp32",)).built is False
    done = build(str(tiny_model), str(tiny_heads), copied, precisions=("int8", "int8"), profiles=("tree-4",))
    assert (done.built, list(done.manifest.graphs)) == (True, ["ort-cpu-int8"])
    assert Bundle.open(copied).graph("ort-cpu")[0].precision == "int8"
    assert not (copied / "graphs/shared.data").exists()
    with pytest.raises(BundleError, match="no precision 'int2' on ort-cpu; expected one of fp32, int8, w8a8, int4"):
        build(str(tiny_model), str(tiny_heads), copied, precisions=("int2",))


def test_a_second_run_does_nothing_and_loads_no_torch(copied: Path, tiny_model: Path, tiny_heads: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    code = (
        "import sys; from medusa_exporter.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    )
    arguments = ["build", str(tiny_model), "--heads", str(tiny_heads), "-o", str(copied), "--json", "-"]
    before_cpu = _children_seconds()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["built"] is False
    assert _children_seconds() - before_cpu < 2  # CPU time: other tests run at the same time
    assert before == {path: path.stat().st_mtime_ns for path in copied.rglob("*")}


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_whatever_changed_is_noticed(copied: Path, tiny_model: Path, tiny_heads: Path, tmp_path: Path) -> None:
    def built(model: Path = tiny_model, heads: Path = tiny_heads, profiles: tuple[str, ...] = ()) -> bool:
        try:
            return build(str(model), str(heads), copied, profiles=profiles).built
        except _Begun:
            return True

    patch = pytest.MonkeyPatch()
    patch.setattr(building, "write_bundle", _begin)
    try:
        assert not built()
        assert built(profiles=("tree-8",))
        heads = Path(shutil.copytree(tiny_heads, tmp_path / "heads"))
        assert built(heads=heads)
        target = copied / "profiles" / "tree-8.toml"
        target.write_text(target.read_text().replace("tree-8", "tree-9"))
        assert built()
    finally:
        patch.undo()
    assert left_behind(tmp_path) == []


class _Begun(Exception):
    pass


def _begin(*_arguments: object) -> None:
    raise _Begun


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_build_leaves_the_old_bundle_and_nothing_else(
    copied: Path, tiny_model: Path, tiny_heads: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    def fail(folder: Path, *_arguments: object) -> None:
        (folder / "half").write_text("half")
        raise stop

    monkeypatch.setattr(building, "write_bundle", fail)
    for target in (copied, copied.parent / "new"):
        with pytest.raises(stop):
            build(str(tiny_model), str(tiny_heads), target, force=True)
    Bundle.open(copied)
    assert not (copied.parent / "new").exists()
    assert left_behind(copied.parent) == []


def test_a_folder_that_is_no_bundle_is_never_touched(tiny_model: Path, tiny_heads: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(BundleError, match="other things in it"):
        build(str(tiny_model), str(tiny_heads), tmp_path / "mine", force=True)
    with pytest.raises(BundleError, match="is a file"):
        build(str(tiny_model), str(tiny_heads), tmp_path / "mine" / "thesis.txt", force=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_a_bundle_inside_of_the_models_folder_is_refused(tiny_model: Path, tiny_heads: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    before = sorted(model.rglob("*"))
    (tmp_path / "link").symlink_to(model)
    for place in (model / "bundle", tmp_path / "link" / "deep" / "bundle"):
        with pytest.raises(BundleError, match=r"bundle is inside of the model's folder .*model.*: give another"):
            build(str(model), str(tiny_heads), place)
    assert sorted(model.rglob("*")) == before


def test_a_bundle_inside_of_the_heads_folder_is_refused(tiny_model: Path, tiny_heads: Path, tmp_path: Path) -> None:
    heads = Path(shutil.copytree(tiny_heads, tmp_path / "heads"))
    with pytest.raises(BundleError, match=r"bundle is inside of the heads' folder .*heads, .*: give another"):
        build(str(tiny_model), str(heads), heads / "bundle")


def test_other_families_are_refused_by_name_before_any_work(tiny_heads: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*llama, mistral, qwen2, qwen3"):
        build(str(tmp_path), str(tiny_heads), tmp_path / "out")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}})
    )
    with pytest.raises(UnsupportedModelError, match="'dynamic'"):
        build(str(tmp_path), str(tiny_heads), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "without config.json"),
        (lambda path: path.write_bytes(b"GG"), "not a GGUF"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text("{")), "not valid JSON"),
    ],
)
def test_what_is_no_model_is_refused(make: object, words: str, tiny_heads: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    make(path)  # type: ignore[operator]
    with pytest.raises(UnsupportedModelError, match=words):
        build(str(path), str(tiny_heads), tmp_path / "out")


def test_profiles_beyond_the_heads_are_refused_and_the_rest_chosen(tmp_path: Path) -> None:
    assert all(tree.depth <= 2 for tree in choose_profiles((), 2))
    with pytest.raises(ProfileError, match=r"chain-3.*depth 3.*2 heads"):
        choose_profiles(("chain-3",), 2)
    with pytest.raises(ProfileError, match="twice"):
        choose_profiles(("chain-2", "chain-2"), 2)
    own = tmp_path / "own.toml"
    own.write_text('name = "own"\nsource = "a test"\npaths = [[0], [1]]\n')
    assert [tree.name for tree in choose_profiles((str(own), "chain-1"), 2)] == ["own", "chain-1"]


def test_the_command_tells_errors_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["build", str(tmp_path / "none.gguf"), "--heads", "x", "-o", str(tmp_path / "out")])
    assert stop.value.code == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_lists_may_be_repeated_or_comma_separated(
    tiny_model: Path, tiny_heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        "medusa_exporter.cli.build.build", lambda *_a, profiles, **_k: (asked.append(profiles), _begin())[0]
    )
    arguments = [str(tiny_model), "--heads", str(tiny_heads), "-o", str(tmp_path / "o")]
    CliRunner().invoke(command, [*arguments, "--profile", "a,b", "--profile", "c"])
    assert asked == [("a", "b", "c")]
