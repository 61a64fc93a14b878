"""Errors as shares of a tensor's largest magnitude, and what is never within a tolerance."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from medusa_exporter.compare.arrays import compare_arrays
from medusa_runtime.errors import MedusaError, MissingExtraError


def array(*numbers: float) -> np.ndarray:
    return np.array([numbers], np.float32)


def test_an_error_is_a_share_of_the_largest_magnitude(capsys: pytest.CaptureFixture[str]) -> None:
    reference = {"a": array(1, -8, 0), "b": array(100, 0.5, 3)}
    found = compare_arrays(reference, {"a": array(1, -8, 0.5), "b": array(100, 0.5, 3)}, 0.1)
    assert found == {"a": (0.0625, True), "b": (0.0, True)}
    assert compare_arrays(reference, {"a": array(1, -8, 1), "b": array(100, 10, 3)}, 0.1) == {
        "a": (0.125, False),
        "b": (pytest.approx(0.095), True),
    }
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")  # polygraphy is talkative


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_fails_on_either_side(wrong: float, capsys: pytest.CaptureFixture[str]) -> None:
    sound, broken = {"a": array(1, 2, 3)}, {"a": array(1, wrong, 3)}
    for reference, other in ((sound, broken), (broken, sound), (broken, broken)):
        error, passed = compare_arrays(reference, other, 0.5)["a"]
        assert not passed
        assert not np.isfinite(error)
    assert capsys.readouterr().out == ""


def test_zeros_must_be_zeros() -> None:
    zeros = {"a": array(0, 0)}
    assert compare_arrays(zeros, {"a": array(0, 0)}, 0.1)["a"] == (0, True)
    assert compare_arrays(zeros, {"a": array(0, 1e-9)}, 0.1)["a"] == (np.inf, False)


def test_names_and_shapes_must_be_the_same() -> None:
    reference = {"new_key_1": array(1, 2), "new_key_11": array(3, 4)}
    with pytest.raises(MedusaError, match=r"new_key_11 has the shape \(1, 3\), expected \(1, 2\)"):
        compare_arrays(reference, reference | {"new_key_11": array(1, 2, 3)}, 0.1)
    with pytest.raises(MedusaError, match=r"new_key_1 has the shape None, expected \(1, 2\)"):
        compare_arrays(reference, {"new_key_11": array(3, 4)}, 0.1)
    with pytest.raises(MedusaError, match=r"new_key_12 has the shape \(1, 2\), expected None"):
        compare_arrays(reference, reference | {"new_key_12": array(3, 4)}, 0.1)


def test_without_polygraphy_the_pip_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy.logger", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'medusa-export\[export\]'"):
        compare_arrays({"a": array(1)}, {"a": array(1)}, 0.1)
