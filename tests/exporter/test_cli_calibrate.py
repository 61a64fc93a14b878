"""`medusa-export calibrate` and `search-tree`: from prompts to the tree that generate uses, and what can go wrong."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from medusa_exporter.calibration import calibrate as module
from medusa_exporter.calibration import step_times
from medusa_exporter.cli.calibrate import doubts
from medusa_exporter.output_kinds import CALIBRATION
from medusa_profiles.catalogue import load_profile_file
from medusa_runtime.bundle import Bundle
from medusa_runtime.calibration import read_calibrations, to_document
from medusa_runtime.engine import Engine

from ..calibrations import acceptance, calibration
from .bench.in_process import prompts_file, run

FAST = ("--seconds", 0, "--threads", 1, "--max-new-tokens", 24)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "MIN_ROUNDS", 1)
    monkeypatch.setattr(step_times, "BURST", 1)
    monkeypatch.setattr(step_times, "SETTLE_SECONDS", 0.0)


def cached() -> list[Path]:
    return sorted(Path(os.environ["MEDUSA_CACHE"]).rglob("*"))


def files() -> list[Path]:
    return [path for path in cached() if path.is_file()]


def test_from_prompts_to_a_tree(tiny_bundle: Path, tmp_path: Path, capsys) -> None:
    output, prompts = tmp_path / "c.json", prompts_file(tmp_path)
    assert run("calibrate", tiny_bundle, "--prompts", prompts, *FAST, "--json", output) == 0
    shown = capsys.readouterr()
    (file,) = files()
    assert str(file) in shown.err and file.parent.name == Bundle.open(tiny_bundle).manifest.digest
    (kept,), (written,) = read_calibrations(file), read_calibrations(output)
    assert kept.to_json() == written.to_json()
    assert (kept.graph, kept.machine.threads, kept.pasts) == ("ort-cpu-fp32", 1, [64, 256])
    assert [answer.conversation for answer in kept.acceptance.answers] == [1, 1, 2, 4]
    assert {len(answer.hits) for answer in kept.acceptance.answers} <= set(range(1, 24))
    fastest = next(line for line in shown.out.splitlines() if line.startswith("fastest: ")).split()[1].strip(";")
    assert Engine.load(tiny_bundle, threads=1).profile.name == fastest
    assert "3" in shown.out and "SKIPPED" in shown.err  # the prompt that does not fit

    best, trees = tmp_path / "best.toml", tmp_path / "trees.json"
    assert run("search-tree", tiny_bundle, "--threads", 1, "-o", best, "--json", trees) == 0
    content = json.loads(trees.read_text())
    assert load_profile_file(best).name == content["best"]
    assert load_profile_file(best).source.startswith("found by search-tree for ")
    assert {"name", "nodes", "tokens_per_step", "overhead", "speedup", "paths"} <= content["trees"][0].keys()
    assert run("search-tree", tiny_bundle, "--calibration", output, "-o", best) == 0  # over its own file
    capsys.readouterr()
    assert run("generate", tiny_bundle, "Hi", "--profile", best, "--threads", 1, "--max-new-tokens", 4) == 0
    assert f"[{content['best']}]" in capsys.readouterr().err
    assert run("generate", tiny_bundle, "Hi", "--calibration", output, "--threads", 1, "--max-new-tokens", 4) == 0
    assert "[auto]" in capsys.readouterr().err
    assert run("verify", tiny_bundle, "--profile", best, "--max-new-tokens", 8, "--prompts", prompts) == 0


def test_without_prompts_the_accuracy_measured_before_is_kept(tiny_bundle: Path, tmp_path: Path, capsys) -> None:
    assert run("calibrate", tiny_bundle, *FAST) == 0
    assert "the heads were not measured: --prompts FILE" in capsys.readouterr().out
    assert run("search-tree", tiny_bundle, "--threads", 1) == 1
    shown = capsys.readouterr().err
    assert (
        "there is a calibration of step times only, expected" in shown
        and f"medusa-export calibrate {tiny_bundle}" in shown
    )
    assert run("calibrate", tiny_bundle, "--prompts", prompts_file(tmp_path), *FAST) == 0
    assert run("calibrate", tiny_bundle, *FAST) == 0
    (one,) = read_calibrations(files()[0])
    assert one.acceptance is not None
    outdated = replace(one, machine=replace(one.machine, library="onnxruntime 1.0"))
    files()[0].write_text(json.dumps(CALIBRATION.marked(to_document([outdated]))))
    assert run("calibrate", tiny_bundle, *FAST) == 0
    (again,) = read_calibrations(files()[0])
    assert again.machine == one.machine
    assert again.acceptance is not None


def test_what_may_not_hold_is_a_warning() -> None:
    few = calibration({1: 10.0, 2: 11.0}, acceptance([[0, 0]] * 10))
    assert [text[:19] for text in doubts(few)] == ["warning: only 2 ans"]
    disturbed = replace(few, steps=tuple(replace(step, spread_ms=step.ms) for step in few.steps))
    assert [text[:19] for text in doubts(disturbed)] == ["warning: the times ", "warning: only 2 ans"]
    assert doubts(replace(few, acceptance=None)) == []


def test_all_precisions_are_calibrated_each_in_its_file(tiny_precisions: Path, tmp_path: Path, capsys) -> None:
    assert run("calibrate", tiny_precisions, *FAST, "--json", "-") == 0
    shown = capsys.readouterr()
    content = json.loads(shown.out)
    graphs = [f"ort-cpu-{precision}" for precision in ("fp32", "int4", "int8", "w8a8")]
    assert sorted(one["graph"] for one in content["graphs"]) == graphs
    assert [path.name.rsplit("-", 1)[0] for path in files()] == graphs
    assert all(graph in shown.err for graph in graphs)


@pytest.mark.parametrize("command", ["calibrate", "search-tree"])
def test_what_is_no_bundle_is_refused(tmp_path: Path, command: str, capsys) -> None:
    assert run(command, tmp_path / "none") == 1
    assert "no such bundle" in capsys.readouterr().err


def test_a_graph_that_the_bundle_lacks_is_refused_before_work(tiny_bundle: Path, capsys) -> None:
    assert run("calibrate", tiny_bundle, "--precision", "fp32,int8") == 1
    assert "has no graph for backend ort-cpu, precision int8" in capsys.readouterr().err
    assert run("calibrate", tiny_bundle, "--backend", "ort-cuda") == 1
    assert "has no graph for backend ort-cuda" in capsys.readouterr().err
    assert not files()


def test_search_needs_a_calibration_that_is_this_bundles(tiny_bundle: Path, tiny_precisions: Path, tmp_path, capsys):
    assert run("search-tree", tiny_bundle) == 1
    assert "there is no calibration for this machine, expected one with" in capsys.readouterr().err
    output = tmp_path / "c.json"
    assert run("calibrate", tiny_precisions, "--precision", "fp32", *FAST, "--json", output) == 0
    for words in (("search-tree", tiny_bundle), ("generate", tiny_bundle, "Hi")):
        capsys.readouterr()
        assert run(*words, "--calibration", output) == 1
        assert "is of the bundle with the digest" in capsys.readouterr().err
        output_of_text = tmp_path / "text.json"
        output_of_text.write_text("text")
        assert run(*words, "--calibration", output_of_text) == 1
        shown = capsys.readouterr().err
        assert "is not a valid calibration" in shown and "Traceback" not in shown


def test_one_conversation_is_too_few_to_search(tiny_bundle: Path, tmp_path: Path, capsys) -> None:
    prompts = prompts_file(tmp_path)
    assert run("calibrate", tiny_bundle, "--prompts", prompts, "--limit", 1, *FAST) == 0
    assert run("search-tree", tiny_bundle, "--threads", 1) == 1
    assert "too few to fit a tree on one half" in capsys.readouterr().err


def test_a_damaged_calibration_is_a_warning_of_generate_unless_it_is_quiet(tiny_bundle: Path, capsys) -> None:
    assert run("calibrate", tiny_bundle, *FAST) == 0
    files()[0].write_text("damaged")
    words = ("generate", tiny_bundle, "Hi", "--threads", 1, "--max-new-tokens", 2)
    for option, expected in (("-v", True), ("-q", False)):  # -v prints it once too
        capsys.readouterr()
        assert run(*words, option) == 0
        assert capsys.readouterr().err.count("is not a valid calibration") == expected


def test_a_cache_that_cannot_be_written_is_reported(tiny_bundle: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path / "file"))
    assert run("calibrate", tiny_bundle, *FAST, "--json", tmp_path / "c.json") == 0
    assert "the calibration cannot be kept" in capsys.readouterr().err
    assert read_calibrations(tmp_path / "c.json")


def test_an_interrupted_run_leaves_nothing_and_the_graphs_before(tiny_precisions: Path, monkeypatch) -> None:
    done = []
    measure = module.measure_step_times

    def interrupted(*arguments, **options):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return measure(*arguments, **options)

    monkeypatch.setattr(module, "measure_step_times", interrupted)
    assert run("calibrate", tiny_precisions, *FAST) == 130
    assert len(files()) == 1 and read_calibrations(files()[0])


def test_a_kill_while_it_is_written_leaves_the_old_file(tiny_bundle: Path, monkeypatch) -> None:
    assert run("calibrate", tiny_bundle, *FAST) == 0
    (file,) = files()
    before = file.read_bytes()

    def fail(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fail)
    assert run("calibrate", tiny_bundle, *FAST) == 130
    assert files() == [file] and file.read_bytes() == before


def test_the_tree_goes_into_a_toml_file_and_over_no_other(tiny_bundle: Path, tmp_path: Path, capsys) -> None:
    assert run("search-tree", tiny_bundle, "-o", tmp_path / "best.json") == 2
    assert "expected a name that ends in .toml" in capsys.readouterr().err
    (tmp_path / "mine.toml").write_text('name = "mine"\npaths = [[0]]\n')
    assert run("search-tree", tiny_bundle, "-o", tmp_path / "mine.toml") == 1
    assert "mine.toml" in capsys.readouterr().err
