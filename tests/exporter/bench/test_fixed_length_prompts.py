"""Prompts of an exact length."""

from __future__ import annotations

from pathlib import Path

import pytest
from medusa_exporter.bench.fixed_length_prompts import prompts_of_length
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import PromptError
from medusa_runtime.layout import Layout

PROMPTS = [("Describe a tree.", "And its roots?"), ("What is a bee?",), ("Write code in C.",)]


@pytest.fixture(scope="module")
def layout(tiny_bundle: Path) -> Layout:
    return Layout(Bundle.open(tiny_bundle))


@pytest.mark.parametrize("length", [40, 77, 300])
def test_each_is_so_long_begins_with_its_own_text_and_ends_where_the_answer_begins(layout: Layout, length: int) -> None:
    found = prompts_of_length(layout, PROMPTS, length)
    assert [len(ids) for ids in found] == [length] * 3
    assert len({tuple(ids) for ids in found}) == 3
    ending = layout.encode("x")[-8:]
    for ids, (first, *_) in zip(found, PROMPTS, strict=True):
        assert ids[-8:] == ending
        assert f"{first}" in layout.tokenizer.decode(ids)
    assert layout.tokenizer.decode(found[0]).startswith("user\nDescribe a tree.\n\nAnd its roots?")


def test_without_a_chat_template_it_is_bare_text(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_template", None)
    (first, *_) = prompts_of_length(layout, PROMPTS, 30)
    assert len(first) == 30
    assert layout.tokenizer.decode(first).startswith("Describe a tree.\n\nAnd")


def test_one_that_is_shorter_than_the_template_is_refused(layout: Layout) -> None:
    with pytest.raises(PromptError, match="no prompt of 5 tokens can be laid out: the template and one word take"):
        prompts_of_length(layout, PROMPTS, 5)
