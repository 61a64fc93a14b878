"""Real TensorRT-RTX engines of a tiny model, built ahead of time without a GPU."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from medusa_exporter.build import build
from medusa_exporter.cli import group
from medusa_exporter.engines import add, flavours
from medusa_exporter.engines.add import add_engines
from medusa_exporter.engines.builder import build_engine
from medusa_exporter.engines.step_sizes import Capacity, choose_capacity
from medusa_exporter.publish import lock_bundle
from medusa_exporter.staging import Staging
from medusa_runtime.backends import load_backend
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import BundleError, MissingExtraError

from ..crash import cuts, hidden

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="TensorRT-RTX is there for Linux on x86-64 alone"
)

STEPS = ["plain", "prefill", "t4", "t8"]
BUILD = {"backends": ("tensorrt-rtx",), "precisions": ("fp16",), "profiles": ("tree-4", "chain-3", "tree-8")}


@pytest.fixture(scope="module")
def graphs(tiny_model: Path, tiny_heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with graphs for TensorRT, no engines yet: chain-3 and tree-4 have four nodes each."""
    bundle = tmp_path_factory.mktemp("engines") / "bundle"
    build(str(tiny_model), str(tiny_heads), bundle, **BUILD)
    return bundle


@pytest.fixture(scope="module")
def made(graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = Path(shutil.copytree(graphs, tmp_path_factory.mktemp("made") / "bundle"))
    add_engines(bundle, "tensorrt-rtx", targets=["sm86", "sm120"], max_length=384)
    return bundle


FUSED = {"Attention", "RMSNormalization", "RotaryEmbedding"}


def operators(bundle: Path, key: str) -> set[str]:
    return {node.op_type for node in onnx.load(bundle / f"graphs/{key}-t4.onnx", load_external_data=False).graph.node}


def test_graphs_are_of_fused_operators_where_the_flavour_takes_them(graphs: Path) -> None:
    assert operators(graphs, "tensorrt-rtx-fp16") >= FUSED


def test_in_fp32_a_fused_attention_is_built_of_parts(tiny_model: Path, tiny_heads: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    build(str(tiny_model), str(tiny_heads), bundle, **BUILD | {"precisions": ("fp32",)})
    assert operators(bundle, "tensorrt-rtx-fp32") >= FUSED
    assert add_engines(bundle, "tensorrt-rtx", targets=["sm86"], max_length=384, steps=["plain", "t8"])


def test_a_flavour_that_comes_to_fuse_gets_new_graphs(
    tiny_model: Path, tiny_heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle"
    monkeypatch.setattr(flavours.Flavour, "fuses", False)
    build(str(tiny_model), str(tiny_heads), bundle, **BUILD)
    assert not operators(bundle, "tensorrt-rtx-fp16") & FUSED
    monkeypatch.undo()
    assert build(str(tiny_model), str(tiny_heads), bundle, **BUILD).built
    assert operators(bundle, "tensorrt-rtx-fp16") >= FUSED


def test_fused_operators_are_refused_where_the_flavour_takes_none(
    graphs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flavours.Flavour, "fuses", False)
    with pytest.raises(
        BundleError, match=r"have fused operators, which tensorrt-rtx 1\.7\S* does not support.*build on this"
    ):
        add_engines(graphs, "tensorrt-rtx", targets=["sm86"])


def test_a_past_of_more_elements_than_a_tensor_may_have_is_refused(
    graphs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Bundle.open(graphs).model
    monkeypatch.setattr(flavours.Flavour, "max_elements", 300 * model.kv_bytes_per_token(1))
    with pytest.raises(BundleError, match=r"no tensor of more than .* of 384 tokens are .* --max-length 296 or less"):
        add_engines(graphs, "tensorrt-rtx", targets=["sm86"], max_length=384, steps=["plain"])
    monkeypatch.undo()
    assert flavours.find_flavour("tensorrt-rtx").max_elements is None


def test_trees_of_one_size_share_an_engine(made: Path) -> None:
    bundle = Bundle.open(made)
    found = {path.stem: facts for facts, path in bundle.engines("tensorrt-rtx", "fp16")}
    assert sorted(found) == [f"tensorrt-rtx-fp16-{step}" for step in STEPS]
    for facts in found.values():
        assert (facts.flavour, facts.targets, facts.batch) == ("tensorrt-rtx", ("sm86", "sm120"), 1)
        assert (facts.least, facts.best, facts.most) == (256, 256, 384)
    four = found["tensorrt-rtx-fp16-t4"]
    assert (four.nodes, four.rows, four.draft) == (4, 4, True)
    prefill = found["tensorrt-rtx-fp16-prefill"]
    assert (prefill.nodes, prefill.rows, prefill.draft) == (256, 1, False)
    assert four.graph == bundle.manifest.files["graphs/tensorrt-rtx-fp16-t4.onnx"].sha256


def test_only_what_changed_is_built_again(made: Path) -> None:
    lines: list[str] = []
    options = {"targets": ["sm86", "sm120"], "max_length": 384}
    assert add_engines(made, "tensorrt-rtx", report=lines.append, **options) == []
    assert len(lines) == len(STEPS) and all("is up to date" in line for line in lines)
    engine = made / "engines/tensorrt-rtx-fp16-t4.engine"
    engine.with_suffix(".json").unlink()
    with pytest.raises(BundleError, match="lacks"):
        add_engines(made, "tensorrt-rtx", **options)
    made.joinpath("engines/tensorrt-rtx-fp16-t4.json").write_text("{}")


def test_another_capacity_is_another_engine_and_a_new_build_keeps_those_that_stand(
    graphs: Path, tmp_path: Path, tiny_model: Path, tiny_heads: Path
) -> None:
    bundle = Path(shutil.copytree(graphs, tmp_path / "bundle"))
    with pytest.raises(BundleError, match=r"no graph for step 't5'.*; there are plain, prefill, t4, t8"):
        add_engines(bundle, "tensorrt-rtx", targets=["sm86"], steps=["t4", "t5"])
    assert add_engines(bundle, "tensorrt-rtx", targets=["sm86"], steps=["t8"]) == ["engines/tensorrt-rtx-fp16-t8"]
    built = add_engines(bundle, "tensorrt-rtx", targets=["sm86"], static_capacity=256)
    assert built == [f"engines/tensorrt-rtx-fp16-{step}" for step in STEPS]
    assert {(facts.least, facts.most) for facts, _ in Bundle.open(bundle).engines("tensorrt-rtx")} == {(256, 256)}
    build(str(tiny_model), str(tiny_heads), bundle, **BUILD | {"profiles": ("tree-4", "tree-16")})
    kept = {path.stem for _, path in Bundle.open(bundle).engines("tensorrt-rtx")}
    assert kept == {f"tensorrt-rtx-fp16-{step}" for step in ("plain", "prefill", "t4")}
    built = add_engines(bundle, "tensorrt-rtx", targets=["sm86"], static_capacity=256)
    assert built == ["engines/tensorrt-rtx-fp16-t16"]


def other_heads(heads: Path, folder: Path) -> Path:
    """Heads of the same shape and name with other weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(heads, folder)
    for file in folder.glob("*.safetensors"):
        save_file({name: tensor + 0.5 for name, tensor in load_file(file).items()}, file)
    return folder


def test_engines_of_other_weights_are_built_again(
    graphs: Path, tmp_path: Path, tiny_model: Path, tiny_heads: Path
) -> None:
    bundle = Path(shutil.copytree(graphs, tmp_path / "bundle"))
    options = {"targets": ["sm86"], "max_length": 256, "steps": ["plain", "t4"]}
    names = ["engines/tensorrt-rtx-fp16-plain", "engines/tensorrt-rtx-fp16-t4"]
    assert add_engines(bundle, "tensorrt-rtx", **options) == names
    before = {path.stem: facts for facts, path in Bundle.open(bundle).engines("tensorrt-rtx")}
    assert [name for name, _ in before["tensorrt-rtx-fp16-t4"].weights] == [
        "graphs/shared.data",
        "graphs/tensorrt-rtx-fp16-t4.onnx.data",
    ]
    build(str(tiny_model), str(tiny_heads), bundle, **BUILD, force=True)
    assert add_engines(bundle, "tensorrt-rtx", **options) == []  # the same weights: kept

    build(str(tiny_model), str(other_heads(tiny_heads, tmp_path / "heads")), bundle, **BUILD)
    now = Bundle.open(bundle, weights=True)
    assert now.manifest.files["graphs/tensorrt-rtx-fp16-t4.onnx"].sha256 == before["tensorrt-rtx-fp16-t4"].graph
    assert now.engines("tensorrt-rtx") == []
    assert add_engines(bundle, "tensorrt-rtx", **options) == names
    after = {path.stem: facts for facts, path in Bundle.open(bundle).engines("tensorrt-rtx")}
    assert after["tensorrt-rtx-fp16-t4"].engine != before["tensorrt-rtx-fp16-t4"].engine


def test_a_damaged_engine_is_left_behind_when_a_bundle_is_replaced(
    graphs: Path, tmp_path: Path, tiny_model: Path, tiny_heads: Path
) -> None:
    bundle = Path(shutil.copytree(graphs, tmp_path / "bundle"))
    add_engines(bundle, "tensorrt-rtx", targets=["sm86"], max_length=256, steps=["plain"])
    engine = bundle / "engines/tensorrt-rtx-fp16-plain.engine"
    engine.write_bytes(engine.read_bytes()[:-1] + b"!")
    build(str(tiny_model), str(tiny_heads), bundle, **BUILD, force=True)
    assert Bundle.open(bundle, weights=True).engines("tensorrt-rtx") == []


@pytest.mark.parametrize(
    ("force", "mounted"),
    [
        (False, False),
        (True, True),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
)
def test_an_engines_build_killed_at_any_access_leaves_a_bundle_that_opens(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool, mounted: bool
) -> None:
    """The engine itself is built once; what is written around it, with a timing cache, is what is cut.

    Where the bundle is a mount point, it may be torn while its files are moved; the next command makes it whole.
    """
    options = {"targets": ["sm86"], "max_length": 256, "steps": ["plain"], "force": force}
    whole = build_engine(
        flavours.find_flavour("tensorrt-rtx"),
        graphs / "graphs/tensorrt-rtx-fp16-plain.onnx",
        "fp16",
        choose_capacity(256, None),
        ["sm86"],
    )
    numbers = iter(range(1_000_000))
    monkeypatch.setattr(
        add, "build_engine", lambda *_a, **_k: replace(whole, timing_cache=f"measured {next(numbers)}".encode())
    )
    start = Path(shutil.copytree(graphs, tmp_path / "start"))
    if force:
        add_engines(start, "tensorrt-rtx", **options)
    bundle, seen = tmp_path / "bundle", set()
    shutil.copytree(start, bundle)
    before, rename = Bundle.open(start).manifest.digest, Path.rename

    def busy(path: Path, target: Path) -> Path:
        if path == bundle:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        return rename(path, target)

    if mounted:
        monkeypatch.setattr(Path, "rename", busy)

    def run() -> None:
        add_engines(bundle, "tensorrt-rtx", **options)

    for _number in cuts(run):
        if mounted and Staging(bundle, inside=True).ready.exists():
            with lock_bundle(bundle):
                pass
        opened = Bundle.open(bundle, weights=True)
        seen.add(opened.manifest.digest == before)
        assert len(opened.engines("tensorrt-rtx")) in ((1,) if force else (0, 1))
        run()
        assert len(Bundle.open(bundle, weights=True).engines("tensorrt-rtx")) == 1
        assert hidden(tmp_path) == hidden(bundle) == []
        shutil.rmtree(bundle)
        shutil.copytree(start, bundle)
    assert seen == {True, False}


def test_a_failed_build_of_an_engine_leaves_the_bundle_as_it_was(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(graphs, tmp_path / "bundle"))
    before = sorted(tmp_path.rglob("*"))
    for target in ("build_engine", "rewrite_manifest"):
        monkeypatch.setattr(add, target, lambda *_a, **_k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            add_engines(bundle, "tensorrt-rtx", targets=["sm86"], max_length=256, steps=["plain"])
        monkeypatch.undo()
        assert sorted(tmp_path.rglob("*")) == before
        Bundle.open(bundle, weights=True)


def test_the_parsers_own_words_reach_the_user_and_nothing_is_left(graphs: Path, tmp_path: Path) -> None:
    flavour = flavours.find_flavour("tensorrt-rtx")
    model = onnx.load(graphs / "graphs/tensorrt-rtx-fp16-plain.onnx")
    model.graph.node[3].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(BundleError, match=r"tensorrt-rtx 1\.\d.* cannot read .*broken\.onnx: .*NoSuchOperator"):
        build_engine(flavour, tmp_path / "broken.onnx", "fp16", Capacity(256, 256, 256), ["sm86"])
    assert [path.name for path in tmp_path.iterdir()] == ["broken.onnx"]
    known = "sm75, sm80, sm86, sm89, sm120, sm121"
    with pytest.raises(BundleError, match=f"does not know the target 'sm60'; expected one or more of {known}"):
        build_engine(flavour, graphs / "graphs/tensorrt-rtx-fp16-plain.onnx", "fp16", Capacity(256, 256, 256), ["sm60"])


def test_the_command_line(graphs: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(graphs, tmp_path / "bundle")
    run = CliRunner()
    nothing = run.invoke(group, ["engines", str(bundle)])
    assert isinstance(nothing.exception, BundleError)
    assert "name the GPUs to build for: --target sm86,sm89" in str(nothing.exception)
    done = run.invoke(group, ["engines", str(bundle), "--target", "sm86", "--max-length", "256"])
    assert done.exit_code == 0, done.output
    assert "engine 3 of 4: build engines/tensorrt-rtx-fp16-t4 for sm86" in done.output
    assert "built 4 engines in" in done.output
    shown = run.invoke(group, ["inspect", str(bundle)])
    assert "tensorrt-rtx-fp16-t4" in shown.output and "sm86" in shown.output
    facts = json.loads(run.invoke(group, ["inspect", str(bundle), "--json", "-"]).stdout)
    assert facts["engines"]["tensorrt-rtx-fp16-t4"]["targets"] == ["sm86"]


def test_what_cannot_be_aimed_at_is_refused_before_any_work(tiny_model: Path, tiny_heads: Path, tmp_path: Path) -> None:
    arguments = ["build", str(tiny_model), "--heads", str(tiny_heads), "-o", str(tmp_path / "bundle")]
    for more, message in (
        ([], "tensorrt-rtx builds ahead of time; name the GPUs to build for: --target sm86,sm89 (of sm75, "),
        (["--target", "sm86,hopper"], "does not know the target 'hopper'; expected one or more of sm75, "),
        (["--target", "sm86", "--static-capacity", "100"], "accepts a multiple of 8 rows, got 100; use 104"),
    ):
        done = CliRunner().invoke(group, [*arguments, "--backend", "tensorrt-rtx", *more])
        assert message in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_without_profiles_named_there_is_one_size_of_tree(tiny_model: Path, tiny_heads: Path, tmp_path: Path) -> None:
    built = build(str(tiny_model), str(tiny_heads), tmp_path / "bundle", backends=("tensorrt-rtx",))
    steps = {name for name in built.manifest.files if name.endswith(".onnx")}
    assert steps == {f"graphs/tensorrt-rtx-fp16-{step}.onnx" for step in ("plain", "prefill", "t64")}
    assert "tree-8" in built.manifest.profiles


def test_without_engines_loading_says_what_to_do(graphs: Path) -> None:
    with pytest.raises(BundleError, match=r"has no engines for tensorrt-rtx-fp16 yet; .*: medusa-export engines "):
        load_backend(Bundle.open(graphs), "tensorrt-rtx")


def test_a_flavour_that_is_not_there_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(flavours.tensorrt_library.MODULES, "tensorrt", ("no_such_tensorrt",))
    with pytest.raises(MissingExtraError, match=r"tensorrt is not installed .*pip install 'medusa-export\[tensorrt\]'"):
        flavours.find_flavour("tensorrt")
