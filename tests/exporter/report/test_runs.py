"""The files that a report reads, and the sentences with which it refuses others."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from medusa_exporter.bench.results import Case
from medusa_exporter.report.runs import ReportError, read_runs

from .factories import content, written


def test_runs_get_letters_and_their_results_are_read(tmp_path: Path) -> None:
    files = [
        written(tmp_path / f"{name}.json", content({name: ms})) for name, ms in (("ort-cuda", 2.0), ("tensorrt", 1.5))
    ]
    one, two = read_runs(files)
    assert (one.letter, one.file, two.letter, two.model) == ("A", "ort-cuda.json", "B", "tiny")
    assert [(one.profile, one.case) for one in two.results] == [
        (name, Case(length, 13)) for length in (100, 400) for name in ("plain", "pair", "chain-2")
    ]
    result = two.results[2]
    assert result.series == ("B", "tensorrt", "fp16")
    assert (result.tokens_per_step, result.overhead, result.speedup) == pytest.approx((3.0, 1.2, 2.5))
    assert result.step_ms["p50"] == pytest.approx(1.8)
    assert two.device("tensorrt") == "H100"


def changed(path: str, value: Any) -> dict[str, Any]:
    """The content with one value put in, or with `value` KeyError taken out."""
    whole = copy.deepcopy(content({"ort-cuda": 2.0}))
    place: Any = whole
    *way, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for part in way:
        place = place[part]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return whole


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("[]", "has schema None, expected 2; give files"),
        ("{", "is not valid JSON"),
        ('{"schema": NaN}', "NaN is not a JSON number"),
        ("[" * 100_000, "is not valid JSON"),
        (changed("schema", 1), "has schema 1, expected 2; measure again with this version; give files"),
        (changed("schema", True), "has schema True"),
        (changed("results", []), r"results is \[\], expected a list of at least one"),
        (changed("results", KeyError), "lacks 'results'"),
        (changed("results/1/speedup", "fast"), r"results\[1\]\.speedup is 'fast', expected a number of at least 0"),
        (changed("results/1/speedup", -1), "expected a number of at least 0"),
        (changed("results/1/speedup", KeyError), "lacks 'speedup'"),
        (changed("results/0/nodes", 1.5), r"results\[0\]\.nodes is 1.5, expected a whole number"),
        (changed("results/0/step_ms/p99", KeyError), "lacks 'p99'"),
        (changed("results/0/step_ms", 3), r"results\[0\]\.step_ms is 3, expected an object"),
        (changed("results/0/profile", ""), r"results\[0\]\.profile is '', expected a text"),
        (changed("results/0/backend", "abacus"), "a result's backend is 'abacus', expected one of ort-cuda"),
        (changed("results/0/same_as_first_backend", {"identical": 1}), "lacks 'answers'"),
        (changed("backends/ort-cuda/device", KeyError), "lacks 'device'"),
        (changed("backends/ort-cuda/memory_bytes_per_second", "2 TB"), "memory_bytes_per_second is '2 TB'"),
        (changed("backends/ort-cuda", None), "backends.ort-cuda is None, expected an object"),
        (changed("settings/forced", {"file": "x"}), "lacks 'model'"),
        (changed("machine", KeyError), "lacks 'machine'"),
        (changed("machine/cpu", KeyError), "lacks 'cpu'"),
        (changed("bundle/model", 7), "bundle.model is 7"),
    ],
)
def test_foreign_and_damaged_files_are_refused_in_one_sentence(tmp_path: Path, what: object, words: str) -> None:
    file = tmp_path / "some.json"
    file.write_text(what if isinstance(what, str) else json.dumps(what))
    with pytest.raises(ReportError, match=words) as refused:
        read_runs([file])
    assert str(refused.value).startswith(str(file))
    assert "give files that medusa-export bench --json wrote" in str(refused.value)


def test_metrics_may_be_missing_where_no_step_was_run(tmp_path: Path) -> None:
    (run,) = read_runs([written(tmp_path / "some.json", changed("results/1/speedup", None))])
    assert run.results[1].speedup is None


def test_files_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    one, same = (written(tmp_path / name, content({"ort-cuda": 2.0})) for name in ("one.json", "same.json"))
    with pytest.raises(ReportError, match=r"same\.json is the same run as .*one\.json; name each once"):
        read_runs([one, same])
    other = written(tmp_path / "other.json", changed("bundle/model", "large"))
    with pytest.raises(ReportError, match=r"other\.json measures large, .*one\.json measures tiny; make a report of"):
        read_runs([one, other])
    with pytest.raises(ReportError, match="got 27 files, expected 26 at most"):
        read_runs([one] * 27)
    with pytest.raises(ReportError, match="cannot be read"):
        read_runs([tmp_path])
