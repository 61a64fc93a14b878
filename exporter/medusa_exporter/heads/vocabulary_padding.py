"""Fits heads' own lm_heads to a model whose vocabulary is padded to another size.

Publishers round vocabularies up to convenient sizes, and not always to the same multiple: Qwen 2.5 has 151,936 rows in
small models and 152,064 in large ones, for the same 151,665 tokens. The additional rows score tokens that are never
used. Any other difference means another vocabulary. Heads with more rows than the model count as padded to small
multiples only: 32,768 rows belong to another tokenizer, not to 32,000 tokens rounded up to a multiple of 1,024.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from medusa_exporter.heads.errors import HeadsError
from medusa_exporter.heads.layouts import MAP_NAME

if TYPE_CHECKING:
    from torch import Tensor

    from medusa_exporter.heads.architecture import HeadArchitecture

MULTIPLES = (64, 128, 256, 512, 1024)  # vocabularies are rounded up to one of these
LM_HEAD = re.compile(r"\d+\.\d+\.weight")
MAX_CUT_MULTIPLE = 256  # the largest of MULTIPLES for heads that have more rows than the model


def is_padding(rows: int, vocab_size: int) -> bool:
    """Return whether the rows of an lm_head and a vocabulary differ only by rounding up to one of `MULTIPLES`."""
    small, large = sorted((rows, vocab_size))
    most = MAX_CUT_MULTIPLE if rows > vocab_size else MULTIPLES[-1]
    return any(large % multiple == 0 and large - small < multiple <= most for multiple in MULTIPLES)


def check_lm_head_rows(rows: int, vocab_size: int, source: object, tokens: int | None = None) -> None:
    """Check that an lm_head has a row for every token of a vocabulary, apart from padding.

    Args:
        rows: Rows of the lm_head.
        vocab_size: Vocabulary size of the model.
        source: The heads, for messages.
        tokens: Number of tokens of the model's tokenizer, `None` if it is not known.

    Raises:
        HeadsError: The lm_head belongs to another vocabulary.
    """
    if rows == vocab_size:
        return
    if not is_padding(rows, vocab_size):
        raise HeadsError(
            f"{source}: heads with an lm_head of {rows} tokens, but the model's vocabulary has {vocab_size}; expected "
            f"as many, or one of the two rounded up to a multiple of {MULTIPLES[0]} to {MULTIPLES[-1]} (to "
            f"{MAX_CUT_MULTIPLE} where the heads have more): give heads trained for this model"
        )
    if tokens is not None and rows < min(tokens, vocab_size):
        raise HeadsError(
            f"{source}: heads with an lm_head of {rows} tokens, but the model's tokenizer has {tokens}; expected a row "
            "for each: give heads trained for this model"
        )


def scored_tokens(facts: HeadArchitecture, vocab_size: int) -> int:
    """Return how many of a model's tokens, from 0 on, heads can score: those that their lm_heads have a row for."""
    whole = facts.own_lm_head_size not in (None, facts.draft_vocabulary)
    return min(vocab_size, facts.own_lm_head_size or vocab_size) if whole else vocab_size


def fit_lm_heads(tensors: Mapping[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Fit lm_heads that have a row for every token, (R, H), to a model of V tokens.

    If R > V, the rows of padding are cut. If R < V, only padding is missing, and the heads get a token_map of the R
    tokens that they score, because rows of zeros could become candidates. Heads with a token_map stay as they are.
    """
    import torch

    names = [name for name in tensors if LM_HEAD.fullmatch(name)]
    if MAP_NAME in tensors or not names:
        return dict(tensors)
    rows = len(tensors[names[0]])
    if rows < vocab_size:
        return {**tensors, MAP_NAME: torch.arange(rows)}
    return {**tensors, **{name: tensors[name][:vocab_size] for name in names}}
