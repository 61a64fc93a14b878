import pytest
import torch
from medusa_exporter.distillation.sampling import Sampling, draw

SHARES = torch.tensor([0.1, 0.5, 0.26, 0.12, 0.02])
DRAWS = 20_000


def frequencies(temperature, sampling, shares=SHARES):
    torch.manual_seed(0)
    drawn = draw(shares.log().expand(DRAWS, -1), torch.full((DRAWS, 1), temperature), sampling)
    assert drawn.shape == (DRAWS, 1)
    return drawn[:, 0].bincount(minlength=len(shares)) / DRAWS


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(min_p=0), [1, 1, 1, 1, 1]),
        (Sampling(), [1, 1, 1, 1, 0]),  # 0.02 is less than 0.05 x 0.5
        (Sampling(min_p=0.22), [0, 1, 1, 1, 0]),
        (Sampling(min_p=1), [0, 1, 0, 0, 0]),
        (Sampling(top_k=1), [0, 1, 0, 0, 0]),
        (Sampling(top_k=3, min_p=0), [0, 1, 1, 1, 0]),
        (Sampling(top_k=99, min_p=0), [1, 1, 1, 1, 1]),
        (Sampling(top_p=0.5, min_p=0), [0, 1, 0, 0, 0]),
        (Sampling(top_p=0.6, min_p=0), [0, 1, 1, 0, 0]),
        (Sampling(top_p=0.97, min_p=0), [1, 1, 1, 1, 0]),
        (Sampling(top_k=2, top_p=0.65, min_p=0), [0, 1, 0, 0, 0]),  # 0.5 of 0.76 is 0.658
        (Sampling(top_k=4, top_p=0.9, min_p=0.3), [0, 1, 1, 0, 0]),
    ],
)
def test_draws_follow_the_distribution_of_what_is_kept(sampling, kept):
    expected = SHARES * torch.tensor(kept)
    found = frequencies(1.0, sampling)
    torch.testing.assert_close(found, expected / expected.sum(), atol=0.012, rtol=0)
    assert (found[expected == 0] == 0).all()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_temperature_comes_before_the_limits(temperature):
    powers = SHARES ** (1 / temperature)
    powers /= powers.sum()
    torch.testing.assert_close(frequencies(temperature, Sampling(min_p=0)), powers, atol=0.012, rtol=0)
    kept = torch.where(powers >= 0.22 * powers.max(), powers, 0)
    torch.testing.assert_close(frequencies(temperature, Sampling(min_p=0.22)), kept / kept.sum(), atol=0.012, rtol=0)
    assert kept.count_nonzero() != (SHARES / SHARES.max() >= 0.22).count_nonzero()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(3, 0.5, 0), Sampling(0, 1.0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_greedy_row_is_the_argmax_beside_rows_that_are_drawn(sampling, dtype):
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = logits.clone()
    temperature = (torch.arange(64) % 2)[:, None].float()
    drawn = draw(logits, temperature, sampling)[:, 0]
    assert drawn[::2].tolist() == logits[::2].argmax(dim=-1).tolist()
    assert drawn[1::2].tolist() != logits[1::2].argmax(dim=-1).tolist()
    assert torch.equal(logits, before)


def test_limits_agree_with_those_of_transformers():
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = 3 * torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    for top_k, top_p, min_p, temperature in ((5, 0.8, 0.05, 0.7), (0, 0.6, 0.0, 1.5), (9, 1.0, 0.2, 1.0)):
        expected = TemperatureLogitsWarper(temperature)(None, logits.clone())
        if top_k:
            expected = TopKLogitsWarper(top_k)(None, expected)
        if top_p < 1:
            expected = TopPLogitsWarper(top_p)(None, expected)
        expected = MinPLogitsWarper(min_p)(None, expected)
        floor = Sampling(top_k, top_p, min_p).floor(logits, torch.full((50, 1), temperature))
        assert torch.equal(logits >= floor, expected.isfinite())


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(min_p=0)])
def test_noise_without_bound_does_not_reach_a_greedy_row(sampling, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", torch.Tensor.zero_)
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    assert draw(logits, torch.zeros(20, 1), sampling)[:, 0].tolist() == logits.argmax(dim=-1).tolist()
