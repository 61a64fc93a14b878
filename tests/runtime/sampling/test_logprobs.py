"""Log-probabilities against a log-softmax in float64."""

import numpy as np
import pytest
from medusa_runtime.errors import InvalidLogitsError
from medusa_runtime.sampling import token_logprobs

from .scripted import ScriptedRows


def expected(row):
    wide = np.asarray(row, dtype=np.float32).astype(np.float64)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


@pytest.mark.parametrize("size", [1, 8, 64, 65, 3000])
@pytest.mark.parametrize("count", [0, 1, 5, 64])
def test_log_probabilities_are_those_of_the_row(size, count):
    rng = np.random.default_rng([size, count])
    for _ in range(10):
        row = np.round(rng.normal(scale=3, size=size), 1).astype(np.float32)  # with equal logits
        ranked = np.argsort(-row, kind="stable")[:count]
        for token in {int(row.argmax()), int(row.argmin()), int(rng.integers(size))}:
            for entries in (None, 64):
                found = token_logprobs(ScriptedRows([row], entries), 0, token, count)
                assert found.token_id == token
                assert found.logprob == pytest.approx(expected(row)[token], abs=2e-6)
                assert [one.token_id for one in found.top] == ranked.tolist()
                assert [one.logprob for one in found.top] == pytest.approx(expected(row)[ranked], abs=2e-6)


def test_the_row_is_read_only_if_the_token_is_not_in_its_summary():
    row = np.arange(100, dtype=np.float32)[::-1]
    for token, read in ((0, []), (63, []), (64, [0])):
        rows = ScriptedRows([row], entries=64)
        token_logprobs(rows, 0, token, 5)
        assert rows.read == read
    for count, read in ((7, []), (8, [0]), (9, [0])):  # the eighth entry's logit may be that of other tokens too
        rows = ScriptedRows([row], entries=8)
        assert len(token_logprobs(rows, 0, 7, count).top) == count
        assert rows.read == read


def test_huge_logits_have_finite_log_probabilities():
    found = token_logprobs(ScriptedRows([[3e38, -3e38, 1.0]]), 0, 1, 3)
    assert found.top[0] == (0, 0.0)
    assert np.isfinite([found.logprob, *(one.logprob for one in found.top)]).all()


def test_a_row_that_is_not_finite_is_rejected():
    for entries in (None, 2):
        with pytest.raises(InvalidLogitsError):
            token_logprobs(ScriptedRows([[0.0, np.nan, 1.0]], entries), 0, 0, 1)
