"""How well heads guess: the rank of the true token under each head."""

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
    """Return hits (P, K): the rank (0-based) at which each head held its target, -1 beyond 64 ranks, -2 for no target.

    Of equally likely tokens the one of lower id counts as the better. A target outside the draft vocabulary is -1.
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
    """`top_accuracy` by ACCURACY_RANKS, under the names that reports use: top1, top5, top10."""
    return {f"top{ranks}": top_accuracy(hits, ranks) for ranks in ACCURACY_RANKS}


def top_accuracy(hits: Hits, ranks: int) -> list[float]:
    """Per head, the share of targets among its `ranks` likeliest tokens; 0 for a head without targets."""
    counted = np.maximum((hits != -2).sum(axis=0), 1)
    good = ((hits >= 0) & (hits < ranks)).sum(axis=0)
    return [round(float(share), 4) for share in good / counted]
