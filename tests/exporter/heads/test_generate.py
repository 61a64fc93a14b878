import time

import numpy as np
import pytest
import torch
from medusa_exporter.heads.generate import MIN_P, Job, Lockstep, draw
from medusa_runtime.errors import CapacityError

LENGTHS = (3, 9, 1, 17, 5, 2, 11)


def prompts():
    random = np.random.default_rng(0)
    return [random.integers(3, 256, size=length) for length in LENGTHS]


def reference(model, prompt, eos, limit):
    ids = torch.from_numpy(prompt)[None]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("rows", [2, 16])
def test_greedy_rows_equal_generate(model, rows):
    free = [reference(model, prompt, [1], 24) for prompt in prompts()]
    eos = (1, free[0][5], free[3][11])  # so that some rows end early
    expected = [reference(model, prompt, list(eos), 24) for prompt in prompts()]
    assert len({len(answer) for answer in expected}) > 1
    jobs = [Job(number, prompt, 0.0, 24) for number, prompt in enumerate(prompts())]
    found = {answer.identity: answer.tokens.tolist() for answer in Lockstep(model, rows, 48, eos).run(jobs)}
    assert found == dict(enumerate(expected))


def test_rows_of_other_temperatures_do_not_disturb_a_greedy_one(model):
    prompt = prompts()[0]
    jobs = [Job(0, prompt, 1.0, 8), Job(1, prompt, 0.0, 8), Job(2, prompt, 0.5, 3)]
    found = {answer.identity: answer.tokens.tolist() for answer in Lockstep(model, 3, 32, (1,)).run(jobs)}
    assert found[1] == reference(model, prompt, [1], 8)
    assert len(found[2]) <= 3


def test_one_lockstep_serves_many_runs_and_leaves_the_model_as_it_was(model):
    before = model.config._attn_implementation
    lockstep, job = Lockstep(model, 4, 32, (1,)), Job(7, prompts()[1], 0.0, 6)
    first, second = (list(lockstep.run([job])) for _ in range(2))
    assert first[0].tokens.tolist() == second[0].tokens.tolist()
    assert model.config._attn_implementation == before


def test_nothing_is_begun_after_the_deadline(model):
    assert list(Lockstep(model, 2, 32, (1,)).run([Job(0, prompts()[0], 0.0, 4)], time.monotonic() - 1)) == []


@pytest.mark.parametrize(
    "job", [Job(0, np.arange(30), 0.0, 8), Job(0, np.arange(0), 0.0, 8), Job(0, np.arange(3), 0.0, 0)]
)
def test_a_job_that_does_not_fit_is_refused(model, job):
    with pytest.raises(CapacityError, match="do not fit"):
        list(Lockstep(model, 2, 32, (1,)).run([job]))


def test_rows_longer_than_the_model_are_refused(model):
    with pytest.raises(CapacityError, match="256"):
        Lockstep(model, 2, 300, (1,))


def test_draws_follow_the_distribution_above_the_floor():
    torch.manual_seed(0)
    shares = torch.tensor([0.5, 0.3, 0.19, 0.5 * MIN_P * 0.5])
    logits = shares.log().expand(20_000, 4)
    drawn = draw(logits, torch.ones(20_000)).bincount(minlength=4) / 20_000
    torch.testing.assert_close(drawn[:3], shares[:3] / shares[:3].sum(), atol=0.02, rtol=0)
    assert drawn[3] == 0
    cold = draw(logits, torch.full((20_000,), 0.5)).bincount(minlength=4) / 20_000
    torch.testing.assert_close(cold[0], (shares[0] ** 2 / (shares[:3] ** 2).sum()), atol=0.02, rtol=0)
    assert (draw(logits, torch.zeros(20_000)) == 0).all()
