"""Results and errors become the bodies that OpenAI's clients expect."""

import json
import math

import pytest
from medusa_runtime.errors import (
    ArgumentError,
    BackendError,
    BundleError,
    CapacityError,
    DeadlineError,
    EngineClosedError,
    InvalidLogitsError,
    PromptError,
    RequestCancelledError,
    RequestError,
    TemplateProcessError,
)
from medusa_runtime.openai_format import CHAT, COMPLETIONS, ResponseFacts, error_body, response_body, status_of
from medusa_runtime.results import Choice, GenerationResult, Logprob, Times, TokenLogprobs

WORDS = {1: "Hel", 2: "lo", 3: "\ufffd", 4: "lo"}
FACTS = ResponseFacts(id="77", created=1_700_000_000, model="tiny", system_fingerprint="abcdef")


def texts(token_id):
    return WORDS[token_id], b"\xe2\x82" if token_id == 3 else WORDS[token_id].encode()


def choice(index, tokens, logprobs=None, **ends):
    text = "".join(WORDS[token] for token in tokens)
    ends = {"finish_reason": "stop", "stop_reason": None} | ends
    return Choice(
        index=index, text=text, token_ids=tuple(tokens), logprobs=logprobs, steps=1, accepted_by_depth=(1,),
        drafted_by_depth=(1,), decode_seconds=0.1, **ends,
    )  # fmt: skip


def result(*choices):
    return GenerationResult((5, 6, 7), choices, 9, "tree-4", "lossless", Times(0, 0.1, 0.2, 0.3))


LOGPROBS = (
    TokenLogprobs(1, -0.5, (Logprob(1, -0.5), Logprob(2, -1.0))),
    TokenLogprobs(3, -math.inf, (Logprob(2, -0.25), Logprob(4, -2.0))),
)


def test_a_chat() -> None:
    body = response_body(CHAT, result(choice(0, [1, 2]), choice(1, [1], finish_reason="length")), FACTS, texts)
    assert body == {
        "id": "chatcmpl-77",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            },
            {
                "index": 1,
                "message": {"role": "assistant", "content": "Hel", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            },
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
        "system_fingerprint": "abcdef",
    }


def test_log_probabilities_of_a_chat() -> None:
    body = response_body(CHAT, result(choice(0, [1, 3], LOGPROBS, stop_reason="x")), FACTS, texts)
    found = body["choices"][0]
    assert found["stop_reason"] == "x"
    assert found["logprobs"]["content"] == [
        {
            "token": "Hel",
            "bytes": [72, 101, 108],
            "logprob": -0.5,
            "top_logprobs": [
                {"token": "Hel", "bytes": [72, 101, 108], "logprob": -0.5},
                {"token": "lo", "bytes": [108, 111], "logprob": -1.0},
            ],
        },
        {
            "token": "\ufffd",
            "bytes": [0xE2, 0x82],
            "logprob": -9999.0,
            "top_logprobs": [
                {"token": "lo", "bytes": [108, 111], "logprob": -0.25},
                {"token": "lo", "bytes": [108, 111], "logprob": -2.0},
            ],
        },
    ]
    json.dumps(body, allow_nan=False)


def test_a_completion() -> None:
    body = response_body(COMPLETIONS, result(choice(0, [1, 3], LOGPROBS)), FACTS, texts)
    assert (body["id"], body["object"]) == ("cmpl-77", "text_completion")
    assert body["choices"] == [
        {
            "index": 0,
            "text": "Hel\ufffd",
            "logprobs": {
                "tokens": ["Hel", "\ufffd"],
                "token_logprobs": [-0.5, -9999.0],
                "top_logprobs": [{"Hel": -0.5, "lo": -1.0}, {"lo": -0.25, "\ufffd": -9999.0}],
                "text_offset": [0, 3],
            },
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert response_body(COMPLETIONS, result(choice(0, [1])), FACTS, texts)["choices"][0]["logprobs"] is None


def test_without_most_likely_tokens_the_chosen_one_is_there() -> None:
    chosen_only = (TokenLogprobs(1, -0.5, ()),)
    body = response_body(COMPLETIONS, result(choice(0, [1], chosen_only)), FACTS, texts)
    assert body["choices"][0]["logprobs"]["top_logprobs"] == [{"Hel": -0.5}]
    body = response_body(CHAT, result(choice(0, [1], chosen_only)), FACTS, texts)
    assert body["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize(
    ("error", "generating", "status", "code"),
    [
        (PromptError("x"), False, 400, None),
        (ArgumentError("x"), False, 400, None),
        (ArgumentError("x"), True, 400, None),
        (CapacityError("x"), False, 400, "context_length_exceeded"),
        (CapacityError("x"), True, 500, None),
        (RequestError("x"), True, 400, None),
        (DeadlineError("x"), True, 500, None),
        (RequestCancelledError("x"), True, 500, None),
        (EngineClosedError("x"), True, 500, None),
        (TemplateProcessError("x"), False, 500, None),
        (BundleError("x"), False, 500, None),
        (BackendError("x"), True, 500, None),
        (InvalidLogitsError("x"), True, 500, None),
    ],
)
def test_errors(error, generating, status, code) -> None:
    assert status_of(error, generating=generating) == status
    kind = "invalid_request_error" if status == 400 else "server_error"
    assert error_body(error, status) == {"error": {"message": "x", "type": kind, "param": None, "code": code}}


def test_an_unexpected_error_names_its_kind() -> None:
    error = ZeroDivisionError("by zero")
    assert status_of(error) == 500
    assert error_body(error, 500)["error"]["message"] == "unexpected ZeroDivisionError: by zero"
