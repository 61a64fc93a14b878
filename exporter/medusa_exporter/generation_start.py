"""Finds the token ids from which a model can generate a text without a prompt."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from medusa_runtime.errors import PromptError, UnsupportedModelError

from medusa_exporter.distillation.template_parts import first_turn_prefix
from medusa_exporter.precisions import FIXED_SCALES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generation_start_ids(tokenizer: PreTrainedTokenizerBase, eos_token_ids: tuple[int, ...]) -> list[int]:
    """Return the token ids before a first user turn, or else the token that begins a text (bos, or eos without one).

    Raises UnsupportedModelError if the model has neither.
    """
    opening: list[int] = []
    if tokenizer.chat_template:
        with contextlib.suppress(PromptError):  # a template that needs something else first is not used
            opening = first_turn_prefix(tokenizer).tolist()
    begin = [token for token in (tokenizer.bos_token_id, *eos_token_ids) if token is not None][:1]
    if not opening and not begin:
        raise UnsupportedModelError(
            "the model has neither a chat template that writes something before a user turn nor a bos or eos token; "
            f"expected one, from which the model can write the text that precisions {', '.join(sorted(FIXED_SCALES))} "
            "are measured on: give --chat-template FILE, name a bos_token in tokenizer_config.json, or choose another "
            "--precision"
        )
    return opening or begin
