"""Measures the accuracy of heads: the rank of the true token among the predictions of each head."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.training.draft_vocabulary import draft_lm_head, tokens_to_rows
from medusa_exporter.training.hidden_states import IGNORED, Positions
from medusa_exporter.training.state_storage import gather_rows

RANKS_KEPT = 64
ACCURACY_RANKS = (1, 5, 10)
POSITIONS_PER_PASS = {"cuda": 4_096, "cpu": 256}

Hits = npt.NDArray[np.int16]


@torch.no_grad()
def measure_hits(heads: MedusaHeads, model: Any, found: Positions) -> Hits:
    """Rank each target among the predictions of its head.

    Of equally likely tokens the one with the lower id ranks higher. For example, a target that is the third most likely
    token of head 1 at position 7 gives `hits[7, 1] == 2`.

    Args:
        heads: The heads.
        model: The decoder.
        found: P positions with K targets each.

    Returns:
        Ranks (P, K) from 0; -1 for a rank of 64 or more or a target outside the draft vocabulary, -2 for no target.
    """
    embedding = model.get_input_embeddings()
    device, dtype = found.root.device, found.hidden.dtype
    lm_head = draft_lm_head(model, heads).to(dtype)
    size = POSITIONS_PER_PASS[device.type]
    parts: list[Hits] = []
    for start in range(0, len(found), size):
        chosen = torch.arange(start, min(start + size, len(found)), device=device)
        hidden, root = gather_rows(found.hidden, chosen), embedding(found.root[chosen])
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            features = heads.features(hidden, root).to(dtype)  # (K, n, H)
        targets = tokens_to_rows(heads, found.targets[chosen], model.config.vocab_size)
        ranks = []
        for k in range(heads.heads):
            own = heads.own_lm_head
            logits = F.linear(features[k], lm_head) if own is None else features[k] @ own[k].to(dtype)  # (n, D)
            target = targets[:, k]
            held = logits.gather(1, target.clamp(min=0)[:, None])
            lower = torch.arange(logits.shape[1], device=device) < target[:, None]
            rank = ((logits > held) | ((logits == held) & lower)).sum(dim=1)
            rank[(rank >= RANKS_KEPT) | (target < 0)] = -1
            ranks.append(torch.where(target == IGNORED, -2, rank).to(torch.int16))
        parts.append(torch.stack(ranks, dim=1).cpu().numpy())
    return np.concatenate(parts)


def accuracies(hits: Hits) -> dict[str, list[float]]:
    """Return `top_accuracy` at 1, 5 and 10 ranks, by the names that reports use: top1, top5, top10."""
    return {f"top{ranks}": top_accuracy(hits, ranks) for ranks in ACCURACY_RANKS}


def top_accuracy(hits: Hits, ranks: int) -> list[float]:
    """Return for each head the share of targets among its `ranks` most likely tokens; 0 for a head without targets."""
    counted = np.maximum((hits != -2).sum(axis=0), 1)
    good = ((hits >= 0) & (hits < ranks)).sum(axis=0)
    return [round(float(share), 4) for share in good / counted]
