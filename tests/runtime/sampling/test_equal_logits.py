"""A model with many equal logits: answers from summaries, which have equal logits in any order, are those of rows."""

import numpy as np
import pytest
from medusa_runtime.sampling_params import SamplingParams

from .. import fake_backend
from ..fake_backend import FakeBackend, logits_of, random_tree
from ..toy_engine import random_ids, toy_engine

LEVELS, ENTRIES = 4, 12
PARAMS = [
    SamplingParams(max_tokens=30, seed=1, **given)
    for given in (
        {"logprobs": 3},
        {"temperature": 0.7, "top_p": 0.5},
        {"temperature": 1.0, "top_k": 5, "top_p": 0.6, "logprobs": ENTRIES},
        {"temperature": 1.0, "min_p": 0.2, "logprobs": 1},
    )
]


@pytest.mark.parametrize("seed", range(10))
def test_answers_are_those_without_summaries(seed, monkeypatch):
    monkeypatch.setattr(fake_backend, "logits_of", lambda *states: np.floor(logits_of(*states) * LEVELS / 8))
    monkeypatch.setattr(fake_backend, "summary_tokens", lambda _: ENTRIES)
    rng = np.random.default_rng(seed)
    tree, prompt = random_tree(rng, 8), random_ids(rng)
    answers = {}
    for summaries in (False, True):
        backend = FakeBackend(hit_rate=0.7, spread=2, summaries=summaries)
        with toy_engine(backend, tree) as engine:
            found = [engine.generate(prompt, params) for params in PARAMS]
        top = [[[other.token_id for other in one.top] for one in result.logprobs or ()] for result in found]
        answers[summaries] = [result.token_ids for result in found], top
        assert bool(backend.read_summaries) == summaries
    assert answers[True] == answers[False]
