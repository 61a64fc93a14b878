"""Rows of a step are checked once, and a row that is not finite is an error that names its place."""

import numpy as np
import pytest
from medusa_runtime.errors import InvalidLogitsError
from medusa_runtime.rows import StepRows

from .fake_backend import FakeBackend, summary_of


class Rows(FakeBackend):
    """A backend whose last step has given rows; `read` and `flagged` list the rows that were asked for."""

    def __init__(self, rows, summaries=False):
        super().__init__(summaries=summaries)
        self.rows, self.read, self.flagged = np.asarray(rows, dtype=np.float32), [], []

    def read_logits(self, row, sequence=0):
        self.read.append(row)
        return self.rows[row]

    def read_summary(self, row, sequence=0):
        return summary_of(self.rows[row]) if self.summaries else None

    def read_finite(self, row, sequence=0):
        self.flagged.append(row)
        return bool(np.isfinite(self.rows[row].sum())) if self.summaries else None


GOOD = [[1, 2, 3], [0, 5, 1]]
BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("summaries", [False, True])
@pytest.mark.parametrize("how", ["whole", "summary", "check"])
def test_a_row_that_is_not_finite_is_named(value, summaries, how):
    rows = StepRows(Rows([[1, 2, 3], [0, value, 1]], summaries))
    rows.begin("of step 7")
    read = {"whole": rows, "summary": rows.summary, "check": rows.check}[how]
    read(0)
    if how == "summary" and not summaries:
        assert read(1) is None
        return
    with pytest.raises(InvalidLogitsError, match=r"computed logits .* at row 1 of step 7 in exact: expected finite"):
        read(1)


def test_a_row_is_checked_once_a_step():
    backend = Rows(GOOD)
    rows = StepRows(backend)
    rows.begin("of step 1")
    rows.check(0)
    backend.rows[0, 0] = np.nan
    rows.check(0)
    assert np.isnan(rows(0)[0])  # was checked
    rows.begin("of step 2")
    with pytest.raises(InvalidLogitsError):
        rows.check(0)


def test_a_device_is_not_asked_for_whole_rows_to_check_them():
    backend = Rows(GOOD, summaries=True)
    rows = StepRows(backend)
    rows.begin("of step 1")
    rows.check(1)
    assert (backend.read, backend.flagged) == ([], [1])
    assert rows.summary(1).ids.tolist() == [1, 2, 0]


def test_a_prompt_whose_logits_are_all_equal_is_invalid_but_for_one_repeated_token():
    rows = StepRows(Rows([[2, 2, 2]]))
    rows.begin("of the prompt", 4)
    rows.check_prompt([5, 5, 5, 5, 5])
    with pytest.raises(InvalidLogitsError, match=r"from 2\.0 to 2\.0 at row 4 of the prompt"):
        rows.check_prompt([5, 5, 5, 5, 6])


@pytest.mark.parametrize("summaries", [False, True])
def test_a_saved_row_does_not_change(summaries):
    backend = Rows(GOOD, summaries)
    rows = StepRows(backend)
    rows.begin("of the prompt")
    saved = rows.save(1)
    backend.rows[:] = 9
    assert saved(0).tolist() == [0, 5, 1]
    summary = saved.summary(0)
    assert (summary.ids.tolist() == [1, 2, 0]) if summaries else (summary is None)


def test_a_row_whose_sum_alone_overflows_is_read_and_is_valid():
    backend = Rows(np.full((1, 40), 3e38, np.float32) * np.linspace(0.9, 1, 40, dtype=np.float32), summaries=True)
    rows = StepRows(backend)
    rows.begin("of step 1")
    with np.errstate(over="ignore"):
        rows.check(0)
        assert backend.read == [0]
        assert rows.summary(0).ids[0] == 39
