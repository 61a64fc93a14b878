"""Prompts of an exact length."""

from __future__ import annotations

from pathlib import Path

import pytest
from medusa_exporter.bench.fixed_length_prompts import prompts_of_length
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import PromptError
from medusa_runtime.prompt_encoder import PromptEncoder

PROMPTS = [("Describe a tree.", "And its roots?"), ("What is a bee?",), ("Write code in C.",)]


@pytest.fixture(scope="module")
def encoder(tiny_bundle: Path) -> PromptEncoder:
    return PromptEncoder(Bundle.open(tiny_bundle))


@pytest.mark.parametrize("length", [40, 77, 300])
def test_each_prompt_has_the_length_its_own_text_first_and_the_template_s_ending(
    encoder: PromptEncoder, length: int
) -> None:
    found = prompts_of_length(encoder, PROMPTS, length)
    assert [len(ids) for ids in found] == [length] * 3
    assert len({tuple(ids) for ids in found}) == 3
    ending = encoder.encode("x")[-8:]
    for ids, (first, *_) in zip(found, PROMPTS, strict=True):
        assert ids[-8:] == ending
        assert f"{first}" in encoder.tokenizer.decode(ids)
    assert encoder.tokenizer.decode(found[0]).startswith("user\nDescribe a tree.\n\nAnd its roots?")


def test_without_a_chat_template_a_prompt_is_plain_text(
    encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "_template", None)
    (first, *_) = prompts_of_length(encoder, PROMPTS, 30)
    assert len(first) == 30
    assert encoder.tokenizer.decode(first).startswith("Describe a tree.\n\nAnd")


def test_a_length_shorter_than_the_template_is_refused(encoder: PromptEncoder) -> None:
    with pytest.raises(PromptError, match="a prompt of 5 tokens is too short: the chat template and one word take"):
        prompts_of_length(encoder, PROMPTS, 5)
