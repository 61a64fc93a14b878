"""Checks what a chat template receives next to the messages: tools, and further names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from medusa_profiles.profile import shown

from medusa_runtime.errors import PromptError
from medusa_runtime.json_values import JsonCopier


def read_tools(tools: object, copier: JsonCopier) -> list[dict[str, Any]] | None:
    """Return definitions of tools in OpenAI's form as dictionaries; None for None and for an empty list.

    Raises:
        PromptError: `tools` is not a list of mappings of JSON values.
    """
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes, bytearray)):
        raise PromptError(
            f"tools is {shown(tools)}, of type {type(tools).__name__}; expected a list of tool definitions: pass a list"
        )
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            name = getattr(tool, "__name__", None)
            got = f"the function {name}" if callable(tool) and name else shown(tool)
            raise PromptError(
                f"tools[{index}] is {got}, of type {type(tool).__name__}; expected a definition in OpenAI's form: "
                'pass {"type": "function", "function": {"name": "…", "parameters": {…}}}'
            )
    return [copier.copy(f"tools[{index}]", tool) for index, tool in enumerate(tools)] or None


def read_template_arguments(arguments: object, reserved: Collection[str], copier: JsonCopier) -> dict[str, Any]:
    """Return further names for a chat template and their values; empty for None.

    Args:
        arguments: A mapping from names to JSON values.
        reserved: Names that the renderer sets.
        copier: Copies the values and counts their characters.

    Raises:
        PromptError: `arguments` is no such mapping, or has a reserved name.
    """
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise PromptError(
            f"chat_template_arguments is {shown(arguments)}, of type {type(arguments).__name__}; expected a mapping "
            "from names to values: pass a dict"
        )
    for name in arguments:
        if not isinstance(name, str) or not name.isidentifier():
            raise PromptError(
                f"chat_template_arguments has the name {shown(name)}; expected names of variables of the template"
            )
        if name in reserved:
            raise PromptError(
                f"chat_template_arguments has {name!r}, which is set by the renderer; expected other names: remove it"
            )
    copied: dict[str, Any] = copier.copy("chat_template_arguments", arguments)
    return copied
