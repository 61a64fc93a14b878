"""The draft vocabulary: the most frequent tokens of a data set, which are the only ones that heads score.

`token_map` (vLLM's name) lists the ids of its D tokens in increasing order. With token_map [5, 9, 40], row 1 of the
heads' lm_head scores token 9.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from medusa_exporter.distillation.dataset import Array, DataError, DataSet
from medusa_exporter.heads.modules import MedusaHeads

OUTSIDE = -2  # row of a token that no head scores


def most_frequent(data: DataSet, size: int) -> Tensor:
    """Return the ids of the `size` most frequent tokens in the answers of `data`, increasing: (D,) int64.

    Of equally frequent tokens the lower id is chosen.

    Raises:
        DataError: `size` is not between 1 and the size of the vocabulary.
    """
    if not 1 <= size <= data.facts.vocab_size:
        raise DataError(
            f"a draft vocabulary of {size} tokens; expected 1 to the model's {data.facts.vocab_size}: "
            "choose another --draft-vocabulary"
        )
    counts = np.bincount(data.tokens[data.answer], minlength=data.facts.vocab_size)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:size]))


def coverage(data: DataSet, token_map: Array) -> float:
    """Return the share of the answers' tokens that are in `token_map`."""
    return float(np.isin(data.tokens[data.answer], token_map).mean())


def draft_lm_head(model: Any, heads: MedusaHeads) -> Tensor:
    """Return the decoder's lm_head, (V, H), or its rows of the draft vocabulary, (D, H).

    It includes the factor by which the decoder scales its logits, so that heads learn the decoder's own distribution.
    """
    weight: Tensor = model.get_output_embeddings().weight.detach()
    weight = weight if heads.token_map is None else weight[heads.token_map.to(weight.device)].contiguous()
    factor = _logit_factor(model.config)
    return weight if factor == 1 else weight * factor


def _logit_factor(config: Any) -> float:
    """Return the factor of a decoder's logits: Cohere's logit_scale, or one over Granite's logits_scaling."""
    scale, scaling = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    return float(scale or 1) / float(scaling or 1)


def tokens_to_rows(heads: MedusaHeads, targets: Tensor, vocab_size: int) -> Tensor:
    """Map token ids to rows of the heads' lm_head, `OUTSIDE` for tokens without one; negative values stay."""
    targets = targets.long()
    if heads.token_map is None:
        return targets
    row = torch.full((vocab_size,), OUTSIDE, device=targets.device)
    row[heads.token_map.to(targets.device)] = torch.arange(len(heads.token_map), device=targets.device)
    return torch.where(targets < 0, targets, row[targets.clamp(min=0)])
