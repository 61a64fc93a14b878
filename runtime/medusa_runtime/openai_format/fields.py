"""The fields of OpenAI's bodies: which are read, which are ignored, and which are accepted with one value only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medusa_profiles.profile import shown

from medusa_runtime.openai_format.failures import BodyError
from medusa_runtime.parameter_names import OTHER_NAMES
from medusa_runtime.sampling_params import UNSUPPORTED

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

# fields with the meaning and the name that they have in `SamplingParams`
PARAMETERS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "n",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "structured_outputs",
    "truncate_prompt_tokens",
)
_READ = {
    CHAT: (
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "logprobs",
        "top_logprobs",
        "tools",
        "tool_choice",
        "chat_template_kwargs",
        "add_generation_prompt",
        "continue_final_message",
        "response_format",
    ),
    COMPLETIONS: ("prompt", "max_tokens", "logprobs", "response_format"),
}
# fields that change no answer
_IGNORED = (
    "metadata",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",
    "user",
)
# fields of which one value asks for what is done anyway
_ONLY: dict[str, Any] = {
    "best_of": 1,
    "echo": False,
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "stream": False,
    "suffix": "",
}
_NOT_SUPPORTED = {
    "audio",
    "chat_template",
    "documents",
    "function_call",
    "functions",
    "reasoning_effort",
    "verbosity",
    "web_search_options",
    *UNSUPPORTED,
} - set(_ONLY)
_OF_THE_OPERATOR = ("acceptance", "draft", "profile")  # options of the command line that no body may set

MAX_DEPTH = 100  # lists and objects inside one another; more than a prompt's values may have


def check_fields(url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a body that are to be read; null means that a field was left out.

    Raises:
        BodyError: The body is no object or too deep, or a field is unknown, or asks for what is not supported; the
            message names it.
    """
    if not isinstance(body, Mapping):
        raise BodyError(f"the body is {shown(body)}, of type {type(body).__name__}; expected a JSON object")
    if _is_deeper(body, MAX_DEPTH):
        raise BodyError(f"the body has lists and objects more than {MAX_DEPTH} deep; expected fewer: simplify it")
    read = ("model", *PARAMETERS, *_READ[url])
    found = {}
    for name, value in body.items():
        if name in read:
            if value is not None:
                found[name] = value
        elif name not in _IGNORED:
            _refuse(name, value, (*read, *_IGNORED))
    return found


def _refuse(name: object, value: object, known: tuple[str, ...]) -> None:
    """Raise BodyError for a field that is not read, unless its value asks for nothing."""
    if name in _ONLY:
        only = _ONLY[str(name)]
        if value is not None and not (type(value) is type(only) and value == only):
            raise BodyError(
                f"{name} is {shown(value)}, which medusa-export does not support; expected {only!r}: leave it out",
                str(name),
            )
    elif name in _NOT_SUPPORTED:
        if value is not None:
            raise BodyError(f"{name!r} is a parameter that medusa-export does not support; leave it out", str(name))
    elif name in OTHER_NAMES:
        if value is not None:
            raise BodyError(f"unknown parameter {name!r}; expected {OTHER_NAMES[str(name)]} in its place", str(name))
    elif name in _OF_THE_OPERATOR:
        raise BodyError(
            f"{name!r} is not a field of a request, but an option of the command that answers it: leave it out, "
            f"and choose it with --{name}",
            str(name),
        )
    else:
        expected = ", ".join(sorted(known))
        raise BodyError(f"unknown parameter {shown(name)}; expected some of {expected}", f"{name!s:.80}")


def _is_deeper(body: Mapping[str, Any], most: int) -> bool:
    """Whether a body has more than `most` lists and objects inside one another; no recursion, which has a limit."""
    level: list[Any] = [body]
    for _ in range(most):
        values = (one.values() if isinstance(one, Mapping) else one for one in level)
        level = [value for inner in values for value in inner if isinstance(value, (Mapping, list, tuple))]
        if not level:
            return False
    return True
