"""A calibration is read as it was written; anything else in the file is refused with what was wrong."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
from medusa_runtime import calibration as module
from medusa_runtime.calibration import StepTime, read_calibrations, to_document
from medusa_runtime.errors import BundleError, CalibrationError

from ..calibrations import acceptance, calibration, steps

HITS = [[0, 1], [2, -1], [-1, 0]]


def document():
    return to_document([calibration(known=acceptance(HITS))])


def write(file, content):
    file.write_text(json.dumps(content))
    return file


def test_it_is_read_as_it_was_written(tmp_path):
    found = read_calibrations(write(tmp_path / "c.json", {"made_by": "medusa-export calibrate", **document()}))
    (one,) = found
    assert to_document(found) == document()
    assert (one.sizes, one.pasts) == ([1, 2, 4, 8], [64, 256])
    hits, answers = one.acceptance.samples()
    assert (hits.tolist(), answers.tolist()) == (HITS * 2, [0, 0, 0, 1, 1, 1])
    assert hits.dtype == np.int16


def test_the_halves_are_the_answers_to_fit_and_to_check_on():
    known = acceptance(HITS, check=[[1, 1]])
    assert known.samples(check=False)[0].tolist() == HITS
    assert known.samples(check=True)[0].tolist() == [[1, 1]]


def test_times_are_interpolated_between_sizes_and_lengths():
    found = calibration({1: 10.0, 2: 20.0, 4: 30.0, 8: 100.0})
    assert [found.step_ms(nodes, 64) for nodes in (1, 2, 3, 6)] == [10, 20, 25, 65]
    assert found.step_ms(1, 160) == pytest.approx(10.5)
    assert found.step_ms(4, 5) == 30 and found.step_ms(4, 9999) == 31
    assert found.step_ms(9, 64) is None


def test_a_tree_below_the_smallest_measured_one_is_no_plain_step():
    assert calibration({1: 10.0, 4: 30.0}).step_ms(2, 64) == 30


def test_other_batches_are_kept_and_do_not_disturb():
    more = (*steps({1: 10.0, 2: 20.0}), StepTime(4, 1, 64, 12.0, 0.1, 5))
    found = calibration(steps=more)
    assert (found.sizes, found.step_ms(1, 64)) == ([1, 2], 10)


@pytest.mark.parametrize(
    "left",
    [steps({2: 1.0}), (), steps({1: 1.0, 2: 2.0})[1:], steps({1: 1.0}) + steps({1: 1.0})],
    ids=["no plain", "none", "a cell is missing", "twice"],
)
def test_times_are_a_whole_table(left):
    with pytest.raises(BundleError, match="one for each size, 1 included, behind each length"):
        calibration(steps=left)


PLACES = {  # path to a value, and values that it cannot have
    ("schema",): [2, None, True, "1"],
    ("graphs",): [[], {}, None, 3],
    ("graphs", 0): [None, [], {}],
    ("graphs", 0, "bundle"): ["", "A" * 64, None, 5],
    ("graphs", 0, "graph"): ["", None, "x" * 2000, "a\nb"],
    ("graphs", 0, "machine"): [None, {}, [1]],
    ("graphs", 0, "machine", "threads"): [-1, 1.5, True, 10**9],
    ("graphs", 0, "machine", "device"): ["", None, "\0"],
    ("graphs", 0, "steps"): [[], None, {}, [1]],
    ("graphs", 0, "steps", 0, "ms"): [0, -1, None, "1", True, 1e12, 10**400],
    ("graphs", 0, "steps", 0, "spread_ms"): [-1, None, 1e12],
    ("graphs", 0, "steps", 0, "nodes"): [0, 1025, 1.0, None],
    ("graphs", 0, "steps", 0, "past"): [-1, 2**31, 1.0],
    ("graphs", 0, "steps", 0, "batch"): [0, None, 2**20],
    ("graphs", 0, "steps", 0, "runs"): [0, 1.5],
    ("graphs", 0, "acceptance"): [3, [], {}],
    ("graphs", 0, "acceptance", "past"): [-1, None, 2**40],
    ("graphs", 0, "acceptance", "ranks"): [[], [0, 1], [True, 1], [5000, 1], [1] * 2000, None],
    ("graphs", 0, "acceptance", "answers"): [[], None, [3], {}],
    ("graphs", 0, "acceptance", "answers", 0, "check"): [0, None, "true"],
    ("graphs", 0, "acceptance", "answers", 0, "conversation"): [0, None, 1.5],
    ("graphs", 0, "acceptance", "answers", 0, "hits"): [[], [0], [0, 10], [0, -2], [0, 1.0], [0, True], None, "00"],
}


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in PLACES.items() for value in values])
def test_a_wrong_value_is_refused(tmp_path, path, value):
    content = document()
    inside = content
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    with pytest.raises(CalibrationError, match=r"c\.json is not a valid calibration: .*; measure again: medusa-export"):
        read_calibrations(write(tmp_path / "c.json", content))


@pytest.mark.parametrize("path", [path for path in PLACES if isinstance(path[-1], str)])
def test_a_missing_and_an_unknown_key_are_refused(tmp_path, path):
    for change in ("drop", "add"):
        content = copy.deepcopy(document())
        inside = content
        for key in path[:-1]:
            inside = inside[key]
        if change == "drop":
            del inside[path[-1]]
        else:
            inside["more"] = 1
        with pytest.raises(CalibrationError, match="is not a valid calibration"):
            read_calibrations(write(tmp_path / "c.json", content))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 1, "a": 2}', "[" * 100_000, "\xff", '{"schema": NaN}'])
def test_what_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "c.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CalibrationError, match="is not a valid calibration"):
        read_calibrations(tmp_path / "c.json")


def test_a_number_that_is_not_finite_is_refused(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(document()).replace("11.0", "Infinity"))
    with pytest.raises(CalibrationError, match="Infinity is not a number"):
        read_calibrations(tmp_path / "c.json")
    with pytest.raises(BundleError):
        StepTime(1, 1, 1, math.nan, 0.0, 1)


def test_a_file_that_is_too_large_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    with pytest.raises(CalibrationError, match="has more than 10 bytes"):
        read_calibrations(write(tmp_path / "c.json", document()))


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(CalibrationError, match=r"c\.json cannot be read: No such file or directory; measure again"):
        read_calibrations(tmp_path / "c.json")
