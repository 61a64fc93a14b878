"""Continued messages: the prompt ends where the last message's content ends, as in transformers."""

from __future__ import annotations

from typing import Any

import pytest
from medusa_runtime.chat_template import ChatTemplate
from medusa_runtime.errors import PromptError
from medusa_runtime.final_message import FinalMessage

from .chat_templates import FAMILIES, special_names

CONTENTS = ["Sure", "Sure, ", "  two\n\nlines\n", "x", "user", "<|im_end|>", '{"a": 1}', "Hi", "é\U0001f642 "]


def continued(template: str, special: dict[str, str], messages: list[dict[str, Any]]) -> str:
    final = FinalMessage(messages)
    return final.cut(ChatTemplate(template, special).render(final.messages, add_generation_prompt=False))


@pytest.mark.parametrize("content", [*CONTENTS, "<think>\na\n</think>\n\nb "], ids=repr)
@pytest.mark.parametrize("family", FAMILIES)
def test_ends_where_transformers_does(family: str, content: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template as theirs

    template, special = FAMILIES[family][0], special_names(family)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    expected, _ = theirs([messages], chat_template=template, tools=None, continue_final_message=True, **special)
    assert continued(template, special, messages) == expected[0]
    assert expected[0].rstrip().endswith(content.strip())
    assert messages[-1]["content"] == content


@pytest.mark.parametrize("content", ["", " \n"], ids=repr)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_blank_message_leaves_the_header(family: str, content: str) -> None:
    """Also where the template strips it, and with it the header's line breaks would be stripped."""
    template, special = FAMILIES[family][0], special_names(family)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    words = continued(template, special, [messages[0], {"role": "assistant", "content": "words"}])
    assert continued(template, special, messages).rstrip(" \n") == words.removesuffix("words").rstrip(" \n")
    if family != "qwen3":  # which strips line breaks in front
        assert continued(template, special, messages).removesuffix(content) == words.removesuffix("words")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}",
        "{{ messages[-1].content | upper }}",
        "{{ messages[-1].content[:3] }}",
        "{{ messages[-1].content | replace('long', 'short') }}",
        "{{ messages[0].content }}{{ messages[-1].content.split(' ')[-2] }}",
    ],
)
def test_a_message_that_the_template_changes_is_refused(template: str) -> None:
    messages = [{"role": "user", "content": "A long text"}, {"role": "assistant", "content": "A long text"}]
    with pytest.raises(PromptError, match="the last message, 'A long text', is not in the text that the chat template"):
        continued(template, {}, messages)


@pytest.mark.parametrize(
    ("message", "got"),
    [
        ({"role": "user", "content": "x"}, "one of the role 'user'"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "one with tool calls"),
    ],
)
def test_only_a_text_of_the_assistant_is_continued(message: dict[str, Any], got: str) -> None:
    with pytest.raises(PromptError, match=f"the last message is {got}; with continue_final_message, expected"):
        FinalMessage([message])
