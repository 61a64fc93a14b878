"""Reads the body of a request of OpenAI's API: prompt, options of the prompt, and sampling parameters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medusa_profiles.profile import shown

from medusa_runtime.arguments import as_bool
from medusa_runtime.errors import ArgumentError
from medusa_runtime.openai_format.failures import BodyError
from medusa_runtime.openai_format.fields import CHAT, COMPLETIONS, PARAMETERS, check_fields
from medusa_runtime.openai_format.response_format import read_response_format
from medusa_runtime.prompt_encoder import Prompt
from medusa_runtime.prompt_options import PromptOptions
from medusa_runtime.sampling_params import SamplingParams

_Parameters = dict[str, tuple[str, Any]]  # by the name in SamplingParams: the name in the body, and the value


@dataclass(frozen=True)
class OpenAIRequest:
    """A request in the terms of `Engine.submit`.

    Args:
        url: `/v1/chat/completions` or `/v1/completions`.
        model: The model that the body names, which the response repeats; None if it names none.
        prompt: The prompt.
        options: How the prompt is encoded.
        params: The sampling parameters.
    """

    url: str
    model: str | None
    prompt: Prompt
    options: PromptOptions
    params: SamplingParams


def read_request(
    url: str,
    body: Mapping[str, Any],
    defaults: SamplingParams | None = None,
    *,
    chat_template_arguments: Mapping[str, Any] | None = None,
    sanitize: bool = False,
) -> OpenAIRequest:
    """Read an untrusted body.

    Args:
        url: `/v1/chat/completions` or `/v1/completions`.
        body: The body, as JSON was parsed. The model is not compared with the bundle's.
        defaults: Parameters of fields that the body leaves out or sets to null; None is `SamplingParams()`. OpenAI's
            own defaults (temperature 1; 16 tokens for a completion) do not apply.
        chat_template_arguments: Names for the chat template, which `chat_template_kwargs` of the body override.
        sanitize: Encode control tokens in texts as ordinary text (`PromptEncoder.encode`).

    Raises:
        BodyError: The body is no object, or a field is unknown, asks for what is not supported, or is invalid.
            Messages, tools and token ids are checked by `Engine.submit`, because the model decides about them.
        ArgumentError: The URL is another one.
    """
    if url not in (CHAT, COMPLETIONS):
        raise ArgumentError(f"the URL is {shown(url)}; expected {CHAT} or {COMPLETIONS}")
    fields = check_fields(url, body)
    model = _read_text("model", fields["model"]) if "model" in fields else None
    if url == CHAT:
        prompt, options = _read_chat(fields, chat_template_arguments or {})
        limit = _read_limit(fields)
        logprobs = _read_chat_logprobs(fields)
    else:
        prompt, options = _read_prompt(fields)
        limit = {name: (name, fields[name]) for name in ("max_tokens",) if name in fields}
        logprobs = {name: (name, fields[name]) for name in ("logprobs",) if name in fields}
    if sanitize:
        options["sanitize"] = True
    named = {name: (name, fields[name]) for name in PARAMETERS if name in fields}
    params = _read_parameters(defaults or SamplingParams(), {**named, **limit, **logprobs, **_read_format(fields)})
    return OpenAIRequest(url, model, prompt, options, params)


def _read_chat(fields: Mapping[str, Any], arguments: Mapping[str, Any]) -> tuple[Prompt, PromptOptions]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise BodyError(f"messages is {shown(messages)}; expected a list of messages, objects with 'role'", "messages")
    options: PromptOptions = {}
    named = fields.get("chat_template_kwargs", {})
    if not isinstance(named, Mapping):
        raise BodyError(
            f"chat_template_kwargs is {shown(named)}; expected an object of names and values", "chat_template_kwargs"
        )
    if arguments or named:
        options["chat_template_arguments"] = {**arguments, **named}
    if _read_tool_choice(fields) == "auto" and "tools" in fields:
        options["tools"] = fields["tools"]
    if _is_continued(fields):
        options["continue_final_message"] = True
    return messages, options


def _read_tool_choice(fields: Mapping[str, Any]) -> str:
    choice = fields.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise BodyError(
            f"tool_choice is {shown(choice)}; expected 'auto', or 'none', which leaves the tools out: medusa-export "
            "cannot make a model call a tool",
            "tool_choice",
        )
    return str(choice)


def _is_continued(fields: Mapping[str, Any]) -> bool:
    continued = _read_bool("continue_final_message", fields.get("continue_final_message", False))
    prompted = _read_bool("add_generation_prompt", fields.get("add_generation_prompt", not continued))
    if prompted == continued:
        raise BodyError(
            f"add_generation_prompt and continue_final_message are both {str(continued).lower()}; expected one of them "
            "to be true: the model begins an answer, or continues the last message",
            "add_generation_prompt",
        )
    return continued


def _read_prompt(fields: Mapping[str, Any]) -> tuple[Prompt, PromptOptions]:
    """Return a prompt of `/v1/completions`: a text, token ids, or a list with one of them."""
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt, {"raw": True}
    if isinstance(prompt, list) and not any(isinstance(one, (str, list, Mapping)) for one in prompt):
        return prompt, {}
    raise BodyError(
        f"prompt is {shown(prompt)}; expected one text or one list of token ids: send a request for each prompt",
        "prompt",
    )


def _read_limit(fields: Mapping[str, Any]) -> _Parameters:
    found = {name: fields[name] for name in ("max_completion_tokens", "max_tokens") if name in fields}
    if len(found) == 2 and found["max_completion_tokens"] != found["max_tokens"]:
        raise BodyError(
            f"max_tokens is {shown(found['max_tokens'])} and max_completion_tokens "
            f"{shown(found['max_completion_tokens'])}; expected one of them: they are two names of one limit",
            "max_tokens",
        )
    return {"max_tokens": next(iter(found.items()))} if found else {}


def _read_chat_logprobs(fields: Mapping[str, Any]) -> _Parameters:
    top = fields.get("top_logprobs", 0)
    if "logprobs" in fields and _read_bool("logprobs", fields["logprobs"]):
        return {"logprobs": ("top_logprobs", top)}
    if top != 0 or isinstance(top, bool):
        raise BodyError(f"top_logprobs is {shown(top)} without logprobs; expected logprobs: true", "top_logprobs")
    return {"logprobs": ("logprobs", None)} if "logprobs" in fields else {}


def _read_format(fields: Mapping[str, Any]) -> _Parameters:
    """Return what the answer has to match, if the body says so in OpenAI's way."""
    if "response_format" not in fields:
        return {}
    outputs = read_response_format(fields["response_format"])
    if "structured_outputs" in fields:
        if outputs is None:
            return {}
        raise BodyError("response_format and structured_outputs are both set; expected one of them", "response_format")
    return {"structured_outputs": ("response_format", outputs)}


def _read_parameters(defaults: SamplingParams, fields: _Parameters) -> SamplingParams:
    """Return the parameters; raise BodyError with the field of the body that is wrong."""
    try:
        return dataclasses.replace(defaults, **{name: value for name, (_, value) in fields.items()})
    except ArgumentError as error:
        message = str(error)
        raise BodyError(_with_names_sent(message, fields), _find_field(defaults, fields, message)) from None


def _with_names_sent(message: str, fields: _Parameters) -> str:
    """Return a message about parameters with the names that the fields of the body have."""
    for name, (field, _) in fields.items():
        if name != field and message.startswith(name):
            return field + message.removeprefix(name)
        if name != field and re.match(rf"min_tokens is \d+ and {name} ", message):
            return re.sub(rf"\b{name}\b", field, message)
    return message


def _find_field(defaults: SamplingParams, fields: _Parameters, message: str) -> str | None:
    """Return the field that causes an error alone; None if only several fields together cause it."""
    for name, (field, value) in fields.items():
        try:
            dataclasses.replace(defaults, **{name: value})
        except ArgumentError as error:
            if str(error) == message:
                return field
    return None


def _read_bool(name: str, value: object) -> bool:
    try:
        return as_bool(name, value)
    except ArgumentError as error:
        raise BodyError(str(error), name) from None


def _read_text(name: str, value: object) -> str:
    if not isinstance(value, str) or any("\ud800" <= character <= "\udfff" for character in value):
        raise BodyError(f"{name} is {shown(value)}, of type {type(value).__name__}; expected a text", name)
    return value
