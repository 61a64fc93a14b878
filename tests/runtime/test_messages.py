"""Conversations in OpenAI's form: rendered as transformers does, and malformed ones refused by place."""

from __future__ import annotations

import enum
import json
from collections import UserList
from types import MappingProxyType
from typing import Any

import pytest
from medusa_runtime.chat_template import ChatTemplate
from medusa_runtime.errors import PromptError
from medusa_runtime.json_values import JsonCopier
from medusa_runtime.messages import read_messages

from .chat_templates import FAMILIES, SMOLLM2, special_names

WITH_TOOLS = ["qwen2.5", "qwen3", "llama3", "hermes", "mistral"]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Wéather of a <city>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ARGUMENTS = {"city": 'Zürich "x" <b>', "days": [1, 2.5, None, True], "deep": {"a": {}}}


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {"id": "abcdef123", "type": "function", "function": {"name": "get_weather", "arguments": arguments}} | more


def conversation(content: Any, arguments: Any) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": content, "tool_calls": [call(arguments)]},
        {"role": "tool", "tool_call_id": "abcdef123", "name": "get_weather", "content": '{"sun": 1}'},
        {"role": "assistant", "content": " Sunny. "},
        {"role": "user", "content": "Thanks"},
    ]


def read(messages: Any) -> list[dict[str, Any]]:
    return read_messages(messages, JsonCopier())


@pytest.mark.parametrize("tools", [None, [TOOL, TOOL]], ids=["no tools", "tools"])
@pytest.mark.parametrize("content", [None, "Let me look."], ids=["no content", "content"])
@pytest.mark.parametrize("family", WITH_TOOLS)
def test_tool_calls_are_rendered_as_transformers_does(family: str, content: str | None, tools: Any) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template as theirs

    template, special = FAMILIES[family][0], special_names(family)
    asked = {"chat_template": template, "add_generation_prompt": True, "tools": tools, **special}
    expected, _ = theirs([conversation(content, ARGUMENTS)], **asked)
    ours = ChatTemplate(template, special)
    for arguments in (ARGUMENTS, json.dumps(ARGUMENTS), json.dumps(ARGUMENTS, indent=2, ensure_ascii=False)):
        assert ours.render(read(conversation(content, arguments)), tools=tools) == expected[0]
    assert '"city": "Zürich \\"x\\" <b>"' in expected[0]
    assert ("Wéather" in expected[0]) == (tools is not None and family != "qwen3")


def test_a_call_without_content_is_an_empty_text_for_templates_that_add_it_up() -> None:
    """As in vLLM; with None, such a template would fail, or write "None"."""
    for template in (SMOLLM2, "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"):
        text = ChatTemplate(template, {}).render(read(conversation(None, "{}")))
        assert "None" not in text and "Sunny" in text
    (message,) = read([{"role": "assistant", "tool_calls": [call("{}")]}])
    assert message["content"] == ""


def test_fields_pass_through_and_null_is_absent() -> None:
    passed = {"role": "assistant", "content": "x", "name": "bot", "reasoning_content": "hm", "more": {"a": [1, None]}}
    absent = {"refusal": None, "function_call": None, "tool_calls": None, "audio": None}
    assert read([passed | absent]) == [passed]
    assert read([passed | {"tool_calls": []}]) == [passed]
    assert read([{"role": "ipython", "content": "any role"}]) == [{"role": "ipython", "content": "any role"}]


def test_the_callers_messages_are_copied() -> None:
    messages = conversation(None, '{"a": [1]}')
    before = json.dumps(messages)
    read(messages)[2]["tool_calls"][0]["function"]["arguments"]["a"].append(2)
    assert json.dumps(messages) == before
    arguments = {"a": [1]}
    read(conversation("", arguments))[2]["tool_calls"][0]["function"]["arguments"]["a"].append(2)
    assert arguments == {"a": [1]}


def test_mappings_and_sequences_of_any_class_become_dicts_and_lists() -> None:
    class Role(str, enum.Enum):
        USER = "user"

    message = MappingProxyType({"role": Role.USER, "content": UserList([{"type": "text", "text": "a"}]), "x": (1,)})
    (found,) = read(UserList([message]))
    assert found == {"role": "user", "content": "a", "x": [1]}
    assert (type(found["role"]), type(found["x"])) == (str, list)


def test_parts_of_text_are_joined_by_line_breaks() -> None:
    parts = [
        {"type": "text", "text": "one "},
        {"type": "text", "text": "", "cache_control": {}},
        {"type": "text", "text": "3"},
    ]
    assert read([{"role": "user", "content": parts}])[0]["content"] == "one \n\n3"
    assert read([{"role": "user", "content": parts[:1]}])[0]["content"] == "one "


@pytest.mark.parametrize(
    ("arguments", "read_as"), [('{"b": 1, "a": 2}', {"b": 1, "a": 2}), ("", {}), ("  ", {}), (None, {}), ({}, {})]
)
def test_arguments_of_a_call(arguments: Any, read_as: dict[str, Any]) -> None:
    (message,) = read([{"role": "assistant", "tool_calls": [call(arguments)]}])
    found = message["tool_calls"][0]["function"]["arguments"]
    assert (found, list(found)) == (read_as, list(read_as))


DEEP: list[Any] = []
for _ in range(70):
    DEEP = [DEEP]
MANY: list[Any] = [0] * 100
for _ in range(5):
    MANY = [MANY] * 100


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"content": "x"}, "message 1 must have texts for 'role' and 'content'"),
        ({"role": 1, "content": "x"}, "message 1 must have texts"),
        ({"role": "user"}, "message 1 must have texts"),
        ({"role": "user", "content": None}, "message 1 must have texts"),
        ({"role": "user", "content": b"x"}, "message 1 must have texts"),
        ({"role": "user", "content": {"type": "text"}}, "message 1 must have texts"),
        ({"role": "assistant", "content": None}, "or None in a message of the assistant with tool calls"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "message 1 must have texts"),
        ({"role": "user", "content": None, "tool_calls": [call("{}")]}, "message 1 must have texts"),
        ("Hi", "message 1 is 'Hi', of type str; expected a mapping"),
        (None, "message 1 is None"),
        ({"role": "user", "content": []}, "content of message 1 is an empty list"),
        ({"role": "user", "content": ["x"]}, "part 0 of the content of message 1 is 'x', of type str"),
        (
            {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]},
            "part 1 of the content of message 1 is of type 'image_url'; expected 'text'",
        ),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "is of type 'input_audio'"),
        ({"role": "user", "content": [{"text": "x"}]}, "is of type None; expected 'text'"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "has None under 'text'"),
        ({"role": "user", "content": "x", "tool_calls": "f"}, "'tool_calls' of message 1 are 'f'"),
        ({"role": "assistant", "tool_calls": ["f"]}, "tool call 0 of message 1 is 'f'; expected a mapping"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, "a text as its 'name'"),
        (
            {"role": "assistant", "tool_calls": [call("{"), 1]},
            r"arguments of tool call 0 of message 1 are '\{', not valid",
        ),
        ({"role": "assistant", "tool_calls": [call("{}"), call("[1]")]}, "tool call 1 of message 1 are .*JSON object"),
        ({"role": "assistant", "tool_calls": [call([1])]}, "expected a JSON object"),
        ({"role": "assistant", "tool_calls": [call('{"a": NaN}')]}, "NaN is not a number of JSON"),
        ({"role": "assistant", "tool_calls": [call('{"a": 1e999}')]}, "holds a value that JSON cannot represent: inf"),
        ({"role": "assistant", "tool_calls": [call('{"a": "\\ud800"}')]}, "not valid Unicode"),
        ({"role": "assistant", "tool_calls": [call("[" * 100_000)]}, "not valid JSON"),
        ({"role": "user", "content": "x", "more": {1, 2}}, "message 1 holds a value that JSON cannot represent"),
        ({"role": "user", "content": "x", "more": float("nan")}, "message 1 holds a value that JSON cannot represent"),
        ({"role": "user", "content": "x", "more": b"x"}, "message 1 holds a value that JSON cannot represent: b'x'"),
        ({"role": "user", "content": "x", "more": {0: 1}}, "message 1 holds a mapping with the key 0, of type int"),
        ({"role": "user", "content": "x", None: 1}, "message 1 holds a mapping with the key None"),
        ({"role": "user", "content": "x", "more": DEEP}, "more than 64 deep"),
        ({"role": "user", "content": "x", "more": MANY}, "holds more than 1048576 values"),
        ({"role": "user", "content": "a\ud800"}, "not valid Unicode"),
        ({"role": "user", "content": "x", "more": ["\ud800"]}, "not valid Unicode"),
        ({"role": "us\udfff", "content": "x"}, "not valid Unicode"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_message_is_refused_by_place(message: Any, complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        read([{"role": "user", "content": "x"}, message])


@pytest.mark.parametrize("prompt", [None, 7, b"Hi", {"role": "user", "content": "Hi"}], ids=repr)
def test_what_is_no_list_of_messages_is_refused(prompt: Any) -> None:
    with pytest.raises(PromptError, match="expected a text, or a list of messages or of token ids"):
        read(prompt)


def test_every_text_is_counted() -> None:
    """All but the names "role" and "content", which every message has."""
    copier = JsonCopier()
    read_messages([{"role": "user", "content": [{"type": "text", "text": "ab"}] * 2, "name": "n" * 100}], copier)
    assert copier.characters == len("user" + "ab\nab" + "name") + 100
    copier = JsonCopier()
    read_messages(
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"k": ["v" * 50]}}}]}], copier
    )
    assert copier.characters == len("assistant" + "tool_calls" + "function" + "name" + "f" + "arguments" + "k") + 50
