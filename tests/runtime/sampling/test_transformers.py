"""The distribution that is drawn from against transformers' logits processors, in float64."""

import numpy as np
import pytest
import torch
from medusa_runtime.sampling.filters import Filters
from medusa_runtime.sampling.processors import Processors
from medusa_runtime.sampling_params import SamplingParams
from transformers.generation import logits_process

CASES = {
    "temperature": SamplingParams(temperature=0.7),
    "high temperature": SamplingParams(temperature=1.6),
    "top_p": SamplingParams(temperature=1.2, top_p=0.95),
    "small top_p": SamplingParams(temperature=1.0, top_p=0.3),
    "top_p near 1": SamplingParams(temperature=1.0, top_p=0.99999),
    "top_k": SamplingParams(temperature=1.0, top_k=50),
    "large top_k": SamplingParams(temperature=1.0, top_k=1900),
    "min_p": SamplingParams(temperature=1.3, min_p=0.05),
    "all filters": SamplingParams(temperature=1.1, min_p=0.002, top_k=40, top_p=0.9),
    "repetition penalty": SamplingParams(temperature=0.8, repetition_penalty=1.3, top_p=0.9),
    "bad words": SamplingParams(temperature=1.0, bad_words=["x"], top_k=20),
    "bias and end": SamplingParams(temperature=1.0, logit_bias={3: 5.0, 9: -4.0}, min_tokens=100, min_p=0.01),
}


def ours(params, row, prompt, output, ends, words):
    """(V,) float64 probabilities."""
    logits = Processors(params, prompt, len(row), ends, words).apply(row, output).astype(np.float64)
    found = Filters.of(params).kept(logits.astype(np.float32))
    kept = np.arange(len(row)) if found is None else found
    probabilities = np.zeros(len(row))
    probabilities[kept] = np.exp((logits[kept] - logits.max()) / params.temperature)
    return probabilities / probabilities.sum()


def theirs(params, row, prompt, output, ends, words):
    """The same by transformers, whose bad words look at the prompt too: here they see the answer only."""
    scores = torch.tensor(row, dtype=torch.float64)[None]
    whole, answer = torch.tensor([[*prompt, *output]]), torch.tensor([output], dtype=torch.long)
    if params.bad_words:
        scores = logits_process.NoBadWordsLogitsProcessor([list(word) for word in words])(answer, scores)
    if params.min_tokens:
        scores = logits_process.MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, list(ends))(
            whole, scores
        )
    if params.logit_bias:
        bias = {(token,): value for token, value in params.logit_bias}
        scores = logits_process.SequenceBiasLogitsProcessor(bias)(whole, scores)
    if params.repetition_penalty != 1:
        scores = logits_process.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(whole, scores)
    scores = logits_process.TemperatureLogitsWarper(params.temperature)(whole, scores)
    if params.min_p:
        scores = logits_process.MinPLogitsWarper(params.min_p)(whole, scores)
    if params.top_k:
        scores = logits_process.TopKLogitsWarper(params.top_k)(whole, scores)
    if params.top_p < 1:
        scores = logits_process.TopPLogitsWarper(params.top_p)(whole, scores)
    return scores.softmax(-1)[0].numpy()


def assert_equal_distributions(params, rows, prompt, answer):
    size = rows.shape[1]
    for at, row in enumerate(rows):
        output = answer[:at]
        likely = np.argsort(-row)[:6].tolist()
        words = [(likely[0],), (output[-1], likely[1]), (output[-1] + 1, likely[2])] if output else [(likely[0],)]
        given = params, row, prompt, output, [likely[3], size - 1], words if params.bad_words else ()
        np.testing.assert_allclose(ours(*given), theirs(*given), atol=1e-5, err_msg=f"row {at}")


@pytest.mark.parametrize("name", CASES)
def test_distributions_of_rows_like_a_models_are_those_of_transformers(name):
    rng = np.random.default_rng(0)
    rows = rng.normal(scale=2, size=(25, 2000))
    for row in rows:
        row[rng.permutation(2000)[:15]] += rng.uniform(3, 12) - np.arange(15) * rng.uniform(0, 1)
    prompt, answer = rng.integers(0, 2000, 30).tolist(), rng.integers(0, 1999, 25).tolist()
    assert_equal_distributions(CASES[name], rows.astype(np.float32), prompt, answer)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_distributions_of_recorded_rows_are_those_of_transformers(name, recorded):
    prompt, answer, rows = recorded
    assert len(rows) == 200
    assert_equal_distributions(CASES[name], rows, prompt, answer)
