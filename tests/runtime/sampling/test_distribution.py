"""Answers of three tokens have the probabilities that the definitions give, with processors and filters."""

import numpy as np
import pytest
from medusa_runtime.sampling import Sampler
from medusa_runtime.sampling_params import SamplingParams

from .reference import joint_distribution
from .scripted import ScriptedModel, ScriptedRows
from .statistic import assert_distribution

DRAWS, FEWER_DRAWS = 100_000, 20_000
LENGTH, PROMPT, ENDS = 3, (1, 6, 6), (5,)
MODEL = ScriptedModel()
CASES = {
    "no filter": (SamplingParams(temperature=1.0), ()),
    "filters": (SamplingParams(temperature=1.4, min_p=0.05, top_k=6, top_p=0.8), ()),
    "penalties": (
        SamplingParams(temperature=0.7, repetition_penalty=1.3, frequency_penalty=0.8, presence_penalty=-0.4),
        (),
    ),
    "forbidden": (
        SamplingParams(
            temperature=1.2,
            top_p=0.95,
            min_tokens=2,
            logit_bias={5: 3.0, 2: -1.5},
            allowed_token_ids=[0, 1, 2, 3, 5, 7],
            bad_words=["words are tokenised elsewhere"],
        ),
        ((3,), (2, 0), (0, 7, 5), (5, 5)),
    ),
}


@pytest.mark.parametrize("draws", [FEWER_DRAWS, pytest.param(DRAWS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_answers_have_the_exact_joint_distribution(name, draws):
    params, bad_words = CASES[name]
    rows = {}

    def rows_behind(output):
        if output not in rows:
            rows[output] = ScriptedRows([MODEL.logits([*PROMPT, *output])])
        return rows[output]

    counts = np.zeros((MODEL.vocab_size,) * LENGTH)
    for draw in range(draws):
        sampler = Sampler(params, PROMPT, MODEL.vocab_size, ENDS, bad_words, seed=draw // 4, choice=draw % 4)
        output = ()
        for _ in range(LENGTH):
            output = (*output, sampler.choose(rows_behind(output), 0, output))
        counts[output] += 1
    assert_distribution(counts, joint_distribution(params, MODEL, PROMPT, LENGTH, ENDS, bad_words))


def test_a_wrong_distribution_would_be_noticed():
    """The joint distributions differ by more than the test's resolution when one processor or filter is left out."""
    params, bad_words = CASES["forbidden"]
    right = joint_distribution(params, MODEL, PROMPT, LENGTH, ENDS, bad_words)
    without_words = joint_distribution(params, MODEL, PROMPT, LENGTH, ENDS, bad_words[:2])
    without_ends = joint_distribution(params, MODEL, PROMPT, LENGTH, (), bad_words)
    for wrong in (without_words, without_ends):
        with pytest.raises(AssertionError):
            assert_distribution(wrong * FEWER_DRAWS, right)
