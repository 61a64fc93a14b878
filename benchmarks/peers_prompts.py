"""The prompts of peers.py: the questions that are answered, and prompts of given lengths to prefill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medusa_runtime.bundle import Bundle

PREFILLS_OF_A_LENGTH = 2


def read_prompts(file: Path, limit: int, bundle: Bundle) -> list[list[int]]:
    """Return the token ids of each first turn, by the bundle's chat template or, without one, of the plain text."""
    from medusa_runtime.chat_template import ChatTemplate
    from medusa_runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer(bundle.tokenizer, str(bundle.root))
    template = ChatTemplate(bundle.chat_template, bundle.special_tokens) if bundle.chat_template else None
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    turns = [json.loads(line)["turns"][0] for line in lines[:limit]]
    if not turns:
        raise SystemExit(f"{file} has no prompts: expected JSON lines with a list of texts under 'turns'")
    if template is not None:
        turns = [template.render([{"role": "user", "content": turn}]) for turn in turns]
    return [tokenizer.encode(turn, add_special_tokens=template is None) for turn in turns]


def prefill_prompts(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """Return prompts of the given lengths, cut from all prompts one after the other; no two begin with the same token.

    So a system that keeps the prefixes of earlier prompts has none to reuse.
    """
    text = [token for prompt in prompts for token in prompt]
    starts = list({token: at for at, token in reversed(list(enumerate(text)))}.values())
    found: list[list[int]] = []
    for length in lengths:
        for _ in range(PREFILLS_OF_A_LENGTH):
            at = starts[len(found) % len(starts)]
            whole = (text[at:] + text[:at]) * (1 + length // len(text))
            found.append(whole[:length])
    return found
