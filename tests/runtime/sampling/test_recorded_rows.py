"""The sampler on rows of the real model: rounding does not change answers, and summaries decide as whole rows do."""

import numpy as np
import pytest
from medusa_runtime.sampling import Sampler, token_logprobs
from medusa_runtime.sampling_params import SamplingParams

from .scripted import ScriptedRows

pytestmark = pytest.mark.slow

ANSWERS, LENGTH, ROUNDING = 200, 100, 3e-5  # logits of a tree's step and of a plain step differ by less in fp32


def test_logits_that_are_rounded_otherwise_give_the_same_answers(recorded):
    """Under 1% of answers of 100 tokens change at temperature 1.2; each is drawn from rows of a real answer."""
    _, answer, rows = recorded
    rng = np.random.default_rng(0)
    rounded = rows + rng.uniform(-ROUNDING, ROUNDING, rows.shape).astype(np.float32)
    readers = [ScriptedRows([row]) for row in rows], [ScriptedRows([row]) for row in rounded]
    changed = 0
    for seed in range(ANSWERS):
        sampler = Sampler(SamplingParams(temperature=1.2), (1,), rows.shape[1], (), (), seed, 0)
        first = int(rng.integers(len(rows) - LENGTH))
        one, other = (
            [sampler.choose(reader[first + at], 0, answer[:at]) for at in range(LENGTH)] for reader in readers
        )
        changed += one != other
    assert changed < 0.01 * ANSWERS


@pytest.mark.parametrize(
    ("params", "least"),
    [
        ({"temperature": 0.7, "top_p": 0.9}, 0.85),
        ({"temperature": 1.0, "top_p": 0.8}, 0.5),
        ({"temperature": 1.0, "min_p": 0.05}, 0.9),
        ({"temperature": 1.2, "top_k": 50}, 0.95),
        ({"temperature": 1.2, "top_k": 40, "top_p": 0.95}, 0.95),
    ],
)
def test_summaries_give_the_tokens_of_whole_rows_and_mostly_suffice(recorded, params, least):
    _, answer, rows = recorded
    whole = 0
    for at, row in enumerate(rows):
        sampler = Sampler(SamplingParams(**params), (1,), len(row), (), (), at, 0)
        summarised = ScriptedRows([row], entries=64)
        assert sampler.choose(summarised, 0, answer[:at]) == sampler.choose(ScriptedRows([row]), 0, answer[:at])
        whole += len(summarised.read)
    assert whole <= (1 - least) * len(rows)


def test_log_probabilities_of_summaries_are_those_of_rows(recorded):
    _, answer, rows = recorded
    for token, row in zip(answer, rows, strict=True):
        one, other = (token_logprobs(ScriptedRows([row], entries), 0, token, 20) for entries in (None, 64))
        assert [found.token_id for found in one.top] == [found.token_id for found in other.top]
        assert abs(one.logprob - other.logprob) < 1e-4
        np.testing.assert_allclose([p for _, p in one.top], [p for _, p in other.top], atol=1e-4)
