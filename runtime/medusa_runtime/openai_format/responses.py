"""Writes results as the bodies that OpenAI's API returns, with vLLM's `stop_reason`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medusa_runtime.openai_format.fields import CHAT
from medusa_runtime.openai_format.token_texts import TokenTexts
from medusa_runtime.results import Choice, GenerationResult, TokenLogprobs

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


def response_body(url: str, result: GenerationResult, facts: ResponseFacts, texts: TokenTexts) -> dict[str, Any]:
    """Return the body of a response: a `chat.completion` or a `text_completion`.

    Args:
        url: `/v1/chat/completions` or `/v1/completions`.
        result: The result.
        facts: What else the response states.
        texts: Texts of the tokens of log-probabilities.
    """
    is_chat = url == CHAT
    usage = result.usage
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{facts.id}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": facts.created,
        "model": facts.model,
        "choices": [(_chat_choice if is_chat else _completion_choice)(choice, texts) for choice in result.choices],
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
        },
        "system_fingerprint": facts.system_fingerprint,
    }


def _chat_choice(choice: Choice, texts: TokenTexts) -> dict[str, Any]:
    logprobs = None if choice.logprobs is None else [_chat_logprobs(one, texts) for one in choice.logprobs]
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": None if logprobs is None else {"content": logprobs, "refusal": None},
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }


def _chat_logprobs(found: TokenLogprobs, texts: TokenTexts) -> dict[str, Any]:
    return {
        **_chat_token(found.token_id, found.logprob, texts),
        "top_logprobs": [_chat_token(one.token_id, one.logprob, texts) for one in found.top],
    }


def _chat_token(token_id: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    text, data = texts(token_id)
    return {"token": text, "bytes": list(data), "logprob": max(logprob, LEAST_LOGPROB)}


def _completion_choice(choice: Choice, texts: TokenTexts) -> dict[str, Any]:
    return {
        "index": choice.index,
        "text": choice.text,
        "logprobs": None if choice.logprobs is None else _completion_logprobs(choice.logprobs, texts),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }


def _completion_logprobs(found: tuple[TokenLogprobs, ...], texts: TokenTexts) -> dict[str, Any]:
    """Return four lists with one element for each token; offsets are in the tokens' joined texts."""
    tokens = [texts(one.token_id)[0] for one in found]
    offsets, offset = [], 0
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [max(one.logprob, LEAST_LOGPROB) for one in found],
        "top_logprobs": [_top(one, texts) for one in found],
        "text_offset": offsets,
    }


def _top(found: TokenLogprobs, texts: TokenTexts) -> dict[str, float]:
    """Return the most likely tokens and the chosen one by their texts; of tokens with one text, the most likely."""
    pairs = [(one.token_id, one.logprob) for one in found.top] + [(found.token_id, found.logprob)]
    top: dict[str, float] = {}
    for token_id, logprob in pairs:
        top.setdefault(texts(token_id)[0], max(logprob, LEAST_LOGPROB))
    return top
