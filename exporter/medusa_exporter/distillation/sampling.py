"""Chooses the next token: the most likely one, or one sampled with temperature, top-k, top-p and min-p."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Which tokens may be sampled at a temperature above 0; the limits apply after the temperature.

    Attributes:
        top_k: Only the k most likely tokens; 0 for no limit.
        top_p: Only the most likely tokens that together hold this share of the probability; 1 for no limit.
        min_p: Only tokens with at least this share of the most likely token's probability; 0 for no limit.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.05

    def floor(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """Return the smallest logit (B, 1) that may be sampled from logits (B, V), at temperature (B, 1)."""
        top = logits.amax(dim=-1, keepdim=True).float()
        floor = top + temperature * math.log(self.min_p) if self.min_p else top.masked_fill(temperature > 0, -torch.inf)
        if self.top_k or self.top_p < 1:  # needs a sort
            size = min(self.top_k or logits.shape[-1], logits.shape[-1])
            ordered = logits.float().topk(size, dim=-1).values  # (B, size), falling
            shares = (ordered / temperature.masked_fill(temperature == 0, 1.0)).softmax(dim=-1)
            kept = (shares.cumsum(dim=-1) - shares < self.top_p).sum(dim=-1, keepdim=True)  # at least 1
            floor = torch.maximum(floor, ordered.gather(1, kept - 1))
        return floor


def draw(logits: Tensor, temperature: Tensor, sampling: Sampling) -> Tensor:
    """Sample one token per row (B, 1) from logits (B, V); where temperature (B, 1) fp32 is 0, take the argmax.

    This is the Gumbel trick: the argmax of logits + temperature x Gumbel noise is a sample from
    softmax(logits / temperature).
    """
    scores = torch.empty(logits.shape, dtype=torch.float32, device=logits.device).exponential_()
    scores.log_().mul_(-temperature).add_(logits)
    scores.masked_fill_(logits < sampling.floor(logits, temperature), -torch.inf)
    return scores.argmax(dim=-1, keepdim=True)
