"""How a prompt is encoded: the options of `PromptEncoder.encode`, which all methods that accept prompts pass on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict


class PromptOptions(TypedDict, total=False):
    """Options of a prompt; see `medusa_runtime.prompt_encoder.PromptEncoder.encode`."""

    raw: bool
    tools: Sequence[Mapping[str, Any]] | None
    chat_template_arguments: Mapping[str, Any] | None
    continue_final_message: bool
    sanitize: bool
