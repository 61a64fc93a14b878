"""Writes results as the bodies that OpenAI's API returns, with vLLM's `stop_reason`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medusa_runtime.openai_format.fields import CHAT
from medusa_runtime.openai_format.token_texts import TokenTexts
from medusa_runtime.results import Choice, GenerationResult, TokenLogprobs

_PLAIN = frozenset(map(chr, range(0x20, 0x7F))) - {"\\"}  # characters that stand for themselves in a name of bytes
LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's and vLLM's value for impossible tokens


@dataclass(frozen=True)
class ResponseFacts:
    """What a response states besides the result.

    Args:
        id: Identifies the response; `chatcmpl-` or `cmpl-` is put in front.
        created: Seconds since 1970.
        model: Name of the model.
        system_fingerprint: Identifies what computed the answer, such as the start of the bundle's digest.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str


def response_body(
    url: str,
    result: GenerationResult,
    facts: ResponseFacts,
    texts: TokenTexts,
    *,
    skip_special_tokens: bool = True,
) -> dict[str, Any]:
    """Return the body of a response: a `chat.completion` or a `text_completion`.

    Args:
        url: `/v1/chat/completions` or `/v1/completions`.
        result: The result.
        facts: What else the response states.
        texts: Texts of the tokens of log-probabilities.
        skip_special_tokens: The request's `SamplingParams.skip_special_tokens`, which decides where in the text the
            tokens of log-probabilities stand.
    """
    is_chat = url == CHAT
    write = _chat_choice if is_chat else _completion_choice
    usage = result.usage
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{facts.id}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": facts.created,
        "model": facts.model,
        "choices": [write(choice, texts, skip_special_tokens) for choice in result.choices],
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        },
        "system_fingerprint": facts.system_fingerprint,
    }


def _chat_choice(choice: Choice, texts: TokenTexts, skips_special: bool) -> dict[str, Any]:
    logprobs = None
    if choice.logprobs is not None:
        places = texts.places(choice.token_ids, skip_special_tokens=skips_special)
        content = [
            _chat_logprobs(found, place.is_first, texts) for found, place in zip(choice.logprobs, places, strict=True)
        ]
        logprobs = {"content": content, "refusal": None}
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }


def _chat_logprobs(found: TokenLogprobs, is_first: bool, texts: TokenTexts) -> dict[str, Any]:
    def token(token_id: int, logprob: float) -> dict[str, Any]:
        text, data = texts(token_id, is_first=is_first)
        return {"token": text, "bytes": list(data), "logprob": max(logprob, LEAST_LOGPROB)}

    return {**token(found.token_id, found.logprob), "top_logprobs": [token(*one) for one in found.top]}


def _completion_choice(choice: Choice, texts: TokenTexts, skips_special: bool) -> dict[str, Any]:
    return {
        "index": choice.index,
        "text": choice.text,
        "logprobs": None if choice.logprobs is None else _completion_logprobs(choice, texts, skips_special),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }


def _completion_logprobs(choice: Choice, texts: TokenTexts, skips_special: bool) -> dict[str, Any]:
    """Return four lists with one element for each token; offsets are in the text of the answer.

    A part of a character has the offset of the character, and a token that is not in the text that of what follows.
    """
    places = texts.places(choice.token_ids, skip_special_tokens=skips_special)
    pairs = list(zip(choice.logprobs or (), places, strict=True))
    return {
        "tokens": [_name(found.token_id, place.is_first, texts) for found, place in pairs],
        "token_logprobs": [max(found.logprob, LEAST_LOGPROB) for found, _ in pairs],
        "top_logprobs": [_top(found, place.is_first, texts) for found, place in pairs],
        "text_offset": [min(place.offset, len(choice.text)) for place in places],  # a stop string may cut the text
    }


def _top(found: TokenLogprobs, is_first: bool, texts: TokenTexts) -> dict[str, float]:
    """Return the most likely tokens and the chosen one by their names.

    Different tokens may have the same text. Then the chosen token's value is returned, otherwise the most likely one's.
    """
    top: dict[str, float] = {}
    for token_id, logprob in found.top:
        top.setdefault(_name(token_id, is_first, texts), max(logprob, LEAST_LOGPROB))
    top[_name(found.token_id, is_first, texts)] = max(found.logprob, LEAST_LOGPROB)
    return top


def _name(token_id: int, is_first: bool, texts: TokenTexts) -> str:
    r"""Return the text of a token, or its bytes like `bytes:\xf0\x9f`, as OpenAI does, if they are no text alone."""
    text, data = texts(token_id, is_first=is_first)
    try:
        data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(chr(byte) if chr(byte) in _PLAIN else f"\\x{byte:02x}" for byte in data)
    return text
