"""Tools and further names for a chat template: JSON values only, and no name that the renderer sets."""

from __future__ import annotations

import re
from typing import Any

import pytest
from medusa_runtime.chat_template import ChatTemplate
from medusa_runtime.errors import PromptError
from medusa_runtime.json_values import JsonCopier
from medusa_runtime.template_inputs import read_template_arguments, read_tools

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
RESERVED = ChatTemplate("x", {"bos_token": "<s>", "image_token": "<i>"}).reserved_names


def get_weather(city: str) -> str:
    return city


def shown(value):
    """A test's name, the same in every process: without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", f"{value!r}")[:40]


def test_tools_are_copied_and_counted() -> None:
    copier = JsonCopier()
    found = read_tools([TOOL, TOOL], copier)
    assert found == [TOOL, TOOL]
    assert found[0] is not TOOL
    assert copier.characters == 2 * len("typefunctionfunctionnamefparameterstypeobjectproperties")


@pytest.mark.parametrize("tools", [None, [], ()])
def test_no_tools_are_none(tools: Any) -> None:
    """Templates ask `tools is not none`."""
    assert read_tools(tools, JsonCopier()) is None


@pytest.mark.parametrize(
    ("tools", "complaint"),
    [
        (TOOL, "tools is .*of type dict; expected a list"),
        ("f", "tools is 'f'"),
        (get_weather, "tools is <function"),
        ([TOOL, get_weather], r"tools\[1\] is the function get_weather, of type function; expected a definition"),
        ([print], r"tools\[0\] is the function print"),
        (["f"], r"tools\[0\] is 'f', of type str"),
        pytest.param(10**5000, "tools is a value too long to show, of type int", id="long"),
        pytest.param([10**5000], r"tools\[0\] is a value too long to show", id="long in a list"),
        ([{"type": {1}}], r"tools\[0\] holds a value that JSON cannot represent"),
        ([TOOL, {"type": get_weather}], r"tools\[1\] holds a value that JSON cannot represent"),
    ],
    ids=shown,
)
def test_other_tools_are_refused(tools: Any, complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        read_tools(tools, JsonCopier())


def test_arguments_reach_the_template() -> None:
    given = {"enable_thinking": False, "style": {"a": [1]}, "documents": [{"title": "t"}]}
    found = read_template_arguments(given, RESERVED, JsonCopier())
    template = ChatTemplate(
        "{{ enable_thinking }} {{ style.a[0] }} {{ documents[0].title }} {{ other is defined }}", {}
    )
    assert template.render([{"role": "user", "content": "x"}], arguments=found) == "False 1 t False"
    assert read_template_arguments(None, RESERVED, JsonCopier()) == {}


@pytest.mark.parametrize(
    "name",
    [
        *("messages", "tools", "add_generation_prompt", "continue_final_message"),
        *("bos_token", "eos_token", "image_token", "raise_exception", "strftime_now", "namespace"),
    ],
)
def test_names_of_the_renderer_are_refused(name: str) -> None:
    with pytest.raises(PromptError, match=f"has '{name}', which is set by the renderer"):
        read_template_arguments({name: 1}, RESERVED, JsonCopier())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([1], "chat_template_arguments is .*of type list; expected a mapping"),
        ("x", "of type str; expected a mapping"),
        ({1: 2}, "has the name 1; expected names of variables"),
        ({"a b": 2}, "has the name 'a b'"),
        pytest.param(10**5000, "chat_template_arguments is a value too long to show, of type int", id="long"),
        pytest.param(
            {"a": [10**5000]}, "chat_template_arguments holds a value that JSON cannot represent", id="long value"
        ),
        pytest.param(
            {"a": {10**5000: 1}},
            "chat_template_arguments holds a mapping with the key a value too long to show",
            id="long key",
        ),
        ({"a": {1}}, "chat_template_arguments holds a value that JSON cannot represent"),
        ({"a": get_weather}, "chat_template_arguments holds a value that JSON cannot represent"),
        ({"a": float("inf")}, "chat_template_arguments holds a value that JSON cannot represent"),
    ],
    ids=shown,
)
def test_other_arguments_are_refused(arguments: Any, complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        read_template_arguments(arguments, RESERVED, JsonCopier())
