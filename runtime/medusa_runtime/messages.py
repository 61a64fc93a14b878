"""Reads conversations in the form of OpenAI's API and turns them into the form that chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from medusa_profiles.profile import shown

from medusa_runtime.errors import PromptError
from medusa_runtime.json_values import JsonCopier

SEPARATOR = "\n"  # between the texts of a message's parts, as in vLLM


def read_messages(prompt: object, copier: JsonCopier) -> list[dict[str, Any]]:
    """Return the messages of a conversation as dictionaries whose "role" and "content" are texts.

    Parts of a content are joined, a content of None next to tool calls becomes "", the arguments of tool calls become
    mappings, and fields that are None and empty lists of tool calls are left out. All else is copied as it is.

    Args:
        prompt: The messages.
        copier: Copies the values and counts their characters; the names "role" and "content" are not counted.

    Raises:
        PromptError: The conversation is empty, or a message is malformed; the error has the message's index.
    """
    if not isinstance(prompt, Sequence) or isinstance(prompt, (str, bytes, bytearray)):
        raise PromptError(
            f"the prompt is {shown(prompt)}, of type {type(prompt).__name__}; expected a text, or a list of messages "
            "or of token ids: pass one of these"
        )
    if not prompt:
        raise PromptError("the prompt is empty: give at least one message")
    return [_read_message(f"message {index}", message, copier) for index, message in enumerate(prompt)]


def _read_message(what: str, message: object, copier: JsonCopier) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise PromptError(
            f"{what} is {shown(message)}, of type {type(message).__name__}; expected a mapping with texts for 'role' "
            "and 'content': pass one text, or such messages"
        )
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if not isinstance(role, str):
        raise _malformed(what, message)
    read: dict[str, Any] = {"role": copier.text(role), "content": ""}
    if isinstance(content, str):
        read["content"] = copier.text(content)
    elif isinstance(content, Sequence) and not isinstance(content, (bytes, bytearray)):
        read["content"] = copier.text(_join_parts(what, content))
    elif content is not None or role != "assistant" or not calls:
        raise _malformed(what, message)
    rest = {name: value for name, value in message.items() if name not in read and value is not None}
    if isinstance(calls, (list, tuple)) and not calls:
        del rest["tool_calls"]
    read |= copier.copy(what, rest)
    if "tool_calls" in rest:
        _read_calls(what, read["tool_calls"])
    return read


def _malformed(what: str, message: Mapping[Any, Any]) -> PromptError:
    return PromptError(
        f"{what} must have texts for 'role' and 'content', got {shown(dict(message))}; a content may also be a list of "
        "parts of text, or None in a message of the assistant with tool calls"
    )


def _join_parts(what: str, parts: Sequence[object]) -> str:
    texts = []
    for index, part in enumerate(parts):
        where = f"part {index} of the content of {what}"
        if not isinstance(part, Mapping):
            raise PromptError(
                f"{where} is {shown(part)}, of type {type(part).__name__}; expected a mapping like "
                '{"type": "text", "text": "…"}'
            )
        if part.get("type") != "text":
            raise PromptError(
                f"{where} is of type {shown(part.get('type'))}; expected 'text', since the model reads text only: "
                "remove the part"
            )
        if not isinstance(text := part.get("text"), str):
            raise PromptError(
                f"{where} has {shown(text)} under 'text', of type {type(text).__name__}; expected a text: pass a str"
            )
        texts.append(text)
    if not texts:
        raise PromptError(f"the content of {what} is an empty list; expected at least one part: pass a text")
    return SEPARATOR.join(texts)


def _read_calls(what: str, calls: object) -> None:
    """Check copied tool calls, and turn their arguments into mappings in place."""
    if not isinstance(calls, list):
        raise PromptError(
            f"'tool_calls' of {what} are {shown(calls)}, of type {type(calls).__name__}; expected a list of tool calls"
        )
    for index, call in enumerate(calls):
        where = f"tool call {index} of {what}"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise PromptError(
                f"{where} is {shown(call)}; expected a mapping with a 'function' that has a text as its 'name': pass "
                '{"type": "function", "function": {"name": "…", "arguments": "{…}"}}'
            )
        function["arguments"] = _read_arguments(where, function.get("arguments"))


def _read_arguments(where: str, arguments: object) -> dict[str, Any]:
    found = arguments
    if isinstance(arguments, str) and arguments.strip():
        try:
            found = json.loads(arguments, parse_constant=_refuse_constant)
            JsonCopier().copy(where, found)
        except (ValueError, RecursionError, PromptError) as error:
            raise PromptError(
                f"the arguments of {where} are {shown(arguments)}, not valid JSON: {error!s:.200}; pass a JSON object"
            ) from None
    elif arguments is None or isinstance(arguments, str):
        found = {}
    if not isinstance(found, dict):
        raise PromptError(
            f"the arguments of {where} are {shown(arguments)}; expected a JSON object, as text or mapping"
        )
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
