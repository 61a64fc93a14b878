"""Cuts prompts to `truncate_prompt_tokens`, and refuses those that leave no room for an answer."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.errors import CapacityError
from medusa_runtime.sampling_params import SamplingParams

Ids = TypeVar("Ids", list[int], NDArray[np.integer[Any]])

ANSWER_SHARE = 4  # a prompt that is cut to fit leaves at most one part in so many of the context for the answer


def truncate_prompt(ids: Ids, params: SamplingParams, context: int) -> Ids:
    """Return the last token ids of a prompt, as many as `truncate_prompt_tokens` keeps.

    -1 keeps a prompt that leaves room for one token or more. Of a longer one it keeps what leaves room for the whole
    answer, or for an answer of a quarter of the context where `max_tokens` is larger. Example: in a context of 400
    tokens, a prompt of 399 is kept; one of 500 is cut to 360 with `max_tokens=40`, and to 300 with `max_tokens=256`.

    Args:
        ids: Token ids of the prompt, at least one.
        params: The parameters of the request.
        context: Maximum number of tokens of prompt and answer together.
    """
    keep = params.truncate_prompt_tokens
    if keep is None:
        return ids
    if keep == -1:
        if len(ids) < context:
            return ids
        share = context // ANSWER_SHARE
        answer = share if params.max_tokens is None else min(params.max_tokens, share)
        keep = max(1, context - max(1, answer))
    return ids[-keep:]


def check_room(ids: list[int], params: SamplingParams, context: int) -> None:
    """Raise CapacityError for a prompt, as it was truncated, that leaves no room for an answer in the context."""
    if len(ids) >= context:
        advice = "set" if params.truncate_prompt_tokens is None else "set a smaller"
        raise CapacityError(
            f"the prompt has {len(ids)} tokens, which leaves no room for an answer in the context of {context} tokens "
            f"(the bundle's context, or max_length); shorten it, allow a longer context, or {advice} "
            "truncate_prompt_tokens"
        )
