"""No command overwrites what it did not write; a refusal comes before any work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from medusa_exporter import output_kinds
from medusa_exporter.cli import COMMANDS, group
from medusa_exporter.files import write_json
from medusa_exporter.output_kinds import CONVERTED, TRAINING
from medusa_exporter.overwrite_check import JsonKind, Kind, OverwriteError, check_output_file, check_output_folder
from medusa_exporter.staging import MARK
from medusa_runtime.errors import MedusaError

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"

# Every option by which a command writes files: the command with its other arguments, none of which has to hold
# anything, since the refusal comes first.
FILES = {
    ("bench", "--json"): ["BUNDLE", "--prompts", "PROMPTS"],
    ("build", "--json"): ["MODEL", "--heads", "HEADS", "-o", "NEW"],
    ("calibrate", "--json"): ["BUNDLE"],
    ("compare", "--json"): ["BUNDLE", "--backends", "ort-cpu,ort-cuda"],
    ("compare", "--save"): ["BUNDLE", "--backends", "ort-cpu"],
    ("distill", "--json"): ["MODEL", "--prompts", "PROMPTS", "-o", "NEW"],
    ("distill", "--review-out"): ["MODEL", "--prompts", "PROMPTS", "-o", "NEW"],
    ("engines", "--json"): ["BUNDLE"],
    ("generate", "--json"): ["BUNDLE", "Hello"],
    ("generate", "-o"): ["BUNDLE", "--batch-file", "PROMPTS"],
    ("heads convert", "--json"): ["HEADS", "-o", "NEW"],
    ("heads-report", "--json"): ["MODEL", "HEADS", "--data", "DATA"],
    ("inspect", "--json"): ["BUNDLE"],
    ("profiles", "--json"): [],
    ("report", "--json"): ["PROMPTS", "-o", "NEW"],
    ("report", "-o"): ["PROMPTS"],
    ("search-tree", "--json"): ["BUNDLE"],
    ("search-tree", "-o"): ["BUNDLE"],
    ("train", "--json"): ["MODEL", "--data", "DATA", "-o", "NEW"],
    ("verify", "--json"): ["BUNDLE"],
}
FOLDERS = {  # and a name in the folder that the command would replace
    ("build", "-o"): (["MODEL", "--heads", "HEADS"], "manifest.json"),
    ("distill", "-o"): (["MODEL", "--prompts", "PROMPTS"], "tokens.npy"),
    ("heads convert", "-o"): (["HEADS", "--force"], "config.json"),
    ("heads-report", "--write-profiles"): (["MODEL", "HEADS", "--data", "DATA"], "tree-8.toml"),
    ("train", "-o"): (["MODEL", "--data", "DATA"], "training.json"),
}
ELSEWHERE = {("train", "--disk")}  # holds scratch files without a name
SCRIPTS = {
    ("build_memory.py", "--json"): ["MODEL", "--heads", "HEADS"],
    ("hugging_face.py", "--json"): ["BUNDLE", "--model", "MODEL", "--prompts", "PROMPTS"],
    ("peers.py", "--json"): ["--bundle", "BUNDLE", "--model", "x.gguf", "--prompts", "PROMPTS"],
    ("peers.py", "--plot"): ["--bundle", "BUNDLE", "--model", "x.gguf", "--prompts", "PROMPTS", "--json", "new.json"],
    ("random_model.py", "-o"): ["--shape", "small"],
    ("step_operators.py", "--json"): ["BUNDLE"],
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with inputs that hold nothing of use."""
    (tmp_path / "PROMPTS").write_text("not even JSON")
    for name in ("DATA", "MODEL", "HEADS"):
        (tmp_path / name).mkdir()
    (tmp_path / "MODEL" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, *arguments: str) -> BaseException | None:
    return CliRunner().invoke(group, [*command.split(), *arguments]).exception


def commands() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in COMMANDS:
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from ((f"{name} {one}", other) for one, other in command.commands.items())
        elif command is not None:
            yield name, command


def test_the_tables_have_every_option_that_names_a_place_to_write_to() -> None:
    found = {
        (name, option)
        for name, command in commands()
        for parameter in command.params
        if isinstance(parameter, click.Option) and isinstance(parameter.type, click.Path) and not parameter.type.exists
        for option in [parameter.opts[0]]
    }
    assert found == FILES.keys() | FOLDERS.keys() | ELSEWHERE
    assert sorted(COMMANDS) == sorted({name.partition(" ")[0] for name, _ in commands()})


def test_the_table_has_every_script_that_writes_files() -> None:
    writing = {
        path.name
        for path in BENCHMARKS.glob("*.py")
        if any(option in path.read_text() for option in ('"--json"', '"--plot"', '"--output"'))
    }
    assert writing == {name for name, _ in SCRIPTS}


@pytest.mark.parametrize(("command", "option"), FILES)
def test_a_file_of_the_users_is_not_replaced(place: Path, command: str, option: str) -> None:
    for content in (b"years of work", b'{"results": []}', b"[1]", b'{"made_by": "medusa-export"}'):
        (place / "thesis").write_bytes(content)
        error = run(command, *FILES[command, option], option, "thesis")
        assert isinstance(error, OverwriteError)
        assert "thesis exists and was not written by medusa-export" in str(error)
        assert str(error).endswith("give another place, or remove it yourself")
        assert (place / "thesis").read_bytes() == content


@pytest.mark.parametrize(("command", "option"), FILES)
def test_a_place_that_cannot_hold_a_file_is_refused(place: Path, command: str, option: str) -> None:
    (place / "empty").write_bytes(b"")
    cases = {
        "DATA": "is a folder; expected the file",
        os.devnull: "is neither a file nor a folder",
        "empty/deep/out": "Not a directory|a part of it is a file",
        "n" * 250: "cannot be written: File name too long",
        "loop": "cannot be written|cannot be",
    }
    (place / "loop").symlink_to(place / "loop")
    for target, words in cases.items():
        error = run(command, *FILES[command, option], option, target)
        if isinstance(error, SystemExit):  # click has refused it
            assert error.code == 2
            continue
        with pytest.raises(OverwriteError, match=words):
            raise error or AssertionError(target)
    assert Path(os.devnull).is_char_device()


@pytest.mark.parametrize(("command", "option"), FILES)
def test_the_prompts_are_no_place_for_a_file(place: Path, command: str, option: str) -> None:
    if "PROMPTS" not in FILES[command, option]:
        return
    (place / "link").symlink_to("PROMPTS")
    for target in ("PROMPTS", "link"):
        with pytest.raises(OverwriteError, match="is one of the files to read"):
            raise run(command, *FILES[command, option], option, target) or AssertionError
    assert (place / "PROMPTS").read_text() == "not even JSON"


@pytest.mark.parametrize(("command", "option"), FOLDERS)
def test_a_file_of_the_users_in_a_folder_is_not_replaced(place: Path, command: str, option: str) -> None:
    arguments, name = FOLDERS[command, option]
    (place / "out").mkdir()
    (place / "out" / name).write_text('{"years": "of work"}')
    error = run(command, *arguments, option, "out")
    assert isinstance(error, MedusaError)
    assert "out" in str(error)
    assert "overwritten" in str(error) or "other things in it" in str(error)
    assert [path.name for path in (place / "out").iterdir()] == [name]
    assert (place / "out" / name).read_text() == '{"years": "of work"}'


@pytest.mark.parametrize(("command", "option"), FOLDERS)
def test_a_file_where_a_folder_is_to_be_is_refused(place: Path, command: str, option: str) -> None:
    arguments, _ = FOLDERS[command, option]
    (place / "thesis").write_text("years")
    error = run(command, *arguments, option, "thesis")
    assert isinstance(error, (MedusaError, SystemExit))
    assert (place / "thesis").read_text() == "years"
    if command != "build":  # which asks when it makes the folder, before any work too: test_publish
        with pytest.raises(OverwriteError, match="thesis/deep"):
            raise run(command, *arguments, option, "thesis/deep") or AssertionError


@pytest.mark.parametrize(
    ("command", "name"),
    [("train", "checkpoint"), ("train", "checkpoint.new"), ("train", "checkpoint.old"), ("distill", "partial")],
)
def test_a_folder_of_the_users_with_a_name_like_ours_is_not_removed(place: Path, command: str, name: str) -> None:
    (place / "out" / name).mkdir(parents=True)
    (place / "out" / name / "thesis.txt").write_text("years")
    refusal = f"out/{name} exists and was not written by medusa-export {command}"
    with pytest.raises(OverwriteError, match=refusal):
        raise run(command, *FOLDERS[command, "-o"][0], "-o", "out") or AssertionError
    assert (place / "out" / name / "thesis.txt").read_text() == "years"


def test_training_does_not_write_into_its_data(place: Path) -> None:
    for target in ("DATA", "DATA/heads"):
        with pytest.raises(OverwriteError, match=r"DATA.* read by this command; give another folder"):
            raise run("train", "MODEL", "--data", "DATA", "-o", target) or AssertionError
    assert list((place / "DATA").iterdir()) == []


@pytest.mark.parametrize(("script", "option"), SCRIPTS)
def test_a_script_replaces_nothing_of_the_users(place: Path, script: str, option: str) -> None:
    target = place / "thesis.svg"
    if script == "random_model.py":
        target = place / "out" / "model" / "config.json"
        target.parent.mkdir(parents=True)
    target.write_text("years")
    named = "out" if script == "random_model.py" else target.name
    command = [sys.executable, str(BENCHMARKS / script), *SCRIPTS[script, option], option, named]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / path) for path in sys.path)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=place, env=paths, timeout=120)
    assert done.returncode != 0
    assert f"{target.name} exists and was not written by benchmarks/{script}" in done.stderr
    assert target.read_text() == "years"


@pytest.mark.skipif(sys.platform == "win32", reason="a script of bash")
def test_the_log_of_a_gpus_figures_is_not_written_over_another(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "log.txt").write_text("years\n")
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "MODEL", "HEADS", "PROMPTS", "out"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=place, timeout=30)
    assert done.returncode == 2
    assert "log.txt exists and was not written by benchmarks/gpu.sh" in done.stderr
    assert (place / "out" / "log.txt").read_text() == "years\n"
    assert [path.name for path in (place / "out").iterdir()] == ["log.txt"]


OURS = [output_kinds.BENCH, output_kinds.COMPARE, output_kinds.VERIFY, output_kinds.HEADS_REPORT]


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.maker)
def test_a_json_of_the_same_command_may_be_replaced_and_no_other(tmp_path: Path, kind: JsonKind) -> None:
    file = tmp_path / "out.json"
    write_json(file, kind.marked({"a": 1}))
    check_output_file(file, kind)
    for other in OURS:
        if other is not kind:
            with pytest.raises(OverwriteError, match=other.maker):
                check_output_file(file, other)
    file.write_text(json.dumps(dict.fromkeys(kind.keys)))  # of a version without the mark
    check_output_file(file, kind)
    for content in ("{", "[" * 100_000, '{"made_by": 1}', "\x00"):
        file.write_text(content)
        with pytest.raises(OverwriteError, match="would be overwritten"):
            check_output_file(file, kind)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json"]


def test_empty_files_and_what_links_lead_to_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "new" / "file")
    (tmp_path / "link").symlink_to(tmp_path / "thesis")
    (tmp_path / "thesis").write_text("years")
    nobody = Kind("nobody", lambda _file: False)
    check_output_file(tmp_path / "empty", nobody)
    check_output_file(tmp_path / "dangling", nobody)
    assert not (tmp_path / "new").exists()
    with pytest.raises(OverwriteError, match="exists and was not written by nobody"):
        check_output_file(tmp_path / "link", nobody)


def test_asking_makes_nothing_and_writing_makes_the_folder(tmp_path: Path) -> None:
    file = tmp_path / "new" / "deep" / "out.json"
    check_output_file(file, output_kinds.BENCH, bundle=tmp_path / "bundle")
    check_output_folder(tmp_path / "new" / "heads", output_kinds.TRAINING)
    assert list(tmp_path.iterdir()) == []
    write_json(file, {})
    assert list(file.parent.iterdir()) == [file]


def test_a_bundle_is_no_place_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(OverwriteError, match="is inside of the bundle"):
        check_output_file(tmp_path / "bundle" / "out.json", output_kinds.BENCH, bundle=tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["heads", "convert", "heads", "-o", "new", "--json", "new/config.json"],
        ["train", "model", "--data", "data", "-o", "new", "--json", "new/training.json"],
        ["train", "model", "--data", "data", "-o", "new", "--json", "new/checkpoint/x.json"],
        ["distill", "model", "--synthesize", "1", "-o", "new", "--json", "new/meta.json"],
        ["distill", "model", "--synthesize", "1", "-o", "new", "--review-out", "new/meta.json"],
        ["distill", "model", "--synthesize", "1", "-o", "new", "--review-out", "x.json", "--json", "x.json"],
        ["heads-report", "model", "heads", "--data", "data", "--write-profiles", "new", "--json", "new/tree-4.toml"],
    ],
    ids=" ".join,
)
def test_two_outputs_of_a_command_have_two_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    result = CliRunner().invoke(group, arguments)
    assert isinstance(result.exception, OverwriteError), result.output
    assert "is where the command writes" in str(result.exception)


def test_a_bundle_of_any_command_is_no_place_for_files(tiny_bundle: Path) -> None:
    for file in (tiny_bundle / "out.json", tiny_bundle / "new" / "out.json"):
        with pytest.raises(OverwriteError, match="is inside of the bundle"):
            check_output_file(file, output_kinds.BENCH)
    for folder in (tiny_bundle, tiny_bundle / "new"):
        with pytest.raises(OverwriteError, match="would be inside of the bundle"):
            check_output_folder(folder, output_kinds.TRAINING)


def test_a_folder_that_nobody_may_write_to_is_refused() -> None:
    with pytest.raises(OverwriteError, match="cannot be written"):
        check_output_file(Path("/proc/out.json"), output_kinds.BENCH)
    with pytest.raises(OverwriteError, match="cannot be written"):
        check_output_folder(Path("/proc/out"), output_kinds.TRAINING)


def test_a_staging_folder_of_the_users_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".cache" / MARK).mkdir(parents=True)
    (tmp_path / ".cache" / MARK / "thesis.txt").write_text("years")
    with pytest.raises(OverwriteError, match=r"it holds 'thesis\.txt'; move that away"):
        check_output_folder(tmp_path, output_kinds.TRAINING)


def test_a_file_in_place_of_the_staging_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    for name in (".cache", f".cache/{MARK}"):
        shutil.rmtree(tmp_path / ".cache", ignore_errors=True)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("years")
        with pytest.raises(OverwriteError, match=f"{name} is a file, expected a folder for unfinished files there"):
            check_output_folder(tmp_path, output_kinds.TRAINING)
        (tmp_path / name).unlink()


def test_what_a_killed_command_left_does_not_replace_a_file_of_the_users(tmp_path: Path) -> None:
    ready = tmp_path / ".cache" / MARK / "ready"
    ready.mkdir(parents=True)
    (ready / "config.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"years": "of work"}')
    with pytest.raises(OverwriteError, match="would be overwritten"):
        check_output_folder(tmp_path, output_kinds.HEADS)
    assert (tmp_path / "config.json").read_text() == '{"years": "of work"}'


def test_other_files_in_a_folder_stay_and_do_no_harm(tmp_path: Path, recwarn: Any) -> None:
    (tmp_path / "notes.txt").write_text("years")
    for kinds in (output_kinds.TRAINING, output_kinds.DATA, output_kinds.HEADS):
        check_output_folder(tmp_path, kinds)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_train_and_convert_keep_each_others_heads(tiny_heads: Path, tmp_path: Path) -> None:
    converted = tmp_path / "heads"
    shutil.copytree(tiny_heads, converted)
    with pytest.raises(OverwriteError, match="config"):
        check_output_folder(converted, TRAINING)
    check_output_folder(converted, CONVERTED)
    (converted / "training.json").write_text(json.dumps({"command": "", "settings": {}, "data": {}, "steps": 1}))
    check_output_folder(converted, TRAINING)
    with pytest.raises(OverwriteError, match="training"):
        check_output_folder(converted, CONVERTED)
