"""The draft vocabulary: the few tokens that heads score, and what tokens are in its terms.

D tokens of V; `token_map` (D,) int64 says which (vLLM's name), rising.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from medusa_exporter.distillation.dataset import Array, DataError, DataSet
from medusa_exporter.heads.modules import MedusaHeads

OUTSIDE = -2  # in place of a row: no head scores this token


def most_frequent(data: DataSet, size: int) -> Tensor:
    """Return the `size` tokens most frequent in the answers of `data`, rising: (D,) int64.

    Of equally frequent tokens the lower id is taken. Raises DataError unless size is between 1 and the vocabulary's.
    """
    if not 1 <= size <= data.facts.vocab_size:
        raise DataError(f"a draft vocabulary of {size} tokens; expected 1 to the model's {data.facts.vocab_size}")
    counts = np.bincount(data.tokens[data.answer], minlength=data.facts.vocab_size)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:size]))


def coverage(data: DataSet, token_map: Array) -> float:
    """The share of the answers' tokens that are in `token_map`."""
    return float(np.isin(data.tokens[data.answer], token_map).mean())


def draft_lm_head(model: Any, heads: MedusaHeads) -> Tensor:
    """Return the decoder's lm_head, (V, H), or its rows of the draft vocabulary, (D, H).

    It is multiplied by what the decoder multiplies its logits by, so that heads learn the decoder's own distribution.
    """
    weight: Tensor = model.get_output_embeddings().weight.detach()
    weight = weight if heads.token_map is None else weight[heads.token_map.to(weight.device)].contiguous()
    factor = _logit_factor(model.config)
    return weight if factor == 1 else weight * factor


def _logit_factor(config: Any) -> float:
    """What a decoder multiplies its lm_head's scores by: Cohere's logit_scale, one over Granite's logits_scaling."""
    scale, scaling = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    return float(scale or 1) / float(scaling or 1)


def tokens_to_rows(heads: MedusaHeads, targets: Tensor, vocab_size: int) -> Tensor:
    """Turn token ids into the rows of the heads' lm_head that score them, OUTSIDE for none; what is negative stays."""
    targets = targets.long()
    if heads.token_map is None:
        return targets
    row = torch.full((vocab_size,), OUTSIDE, device=targets.device)
    row[heads.token_map.to(targets.device)] = torch.arange(len(heads.token_map), device=targets.device)
    return torch.where(targets < 0, targets, row[targets.clamp(min=0)])
