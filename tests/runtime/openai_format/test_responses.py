"""Results and errors become the bodies that OpenAI's clients expect."""

import json
import math
from itertools import accumulate

import pytest
from medusa_runtime import Engine, SamplingParams
from medusa_runtime.errors import (
    ArgumentError,
    BackendError,
    BundleError,
    CalibrationError,
    CapacityError,
    DeadlineError,
    EngineClosedError,
    InvalidLogitsError,
    MedusaError,
    PromptError,
    QueueFullError,
    RequestCancelledError,
    RequestError,
    TemplateProcessError,
)
from medusa_runtime.openai_format import (
    CHAT,
    COMPLETIONS,
    ResponseFacts,
    TokenTexts,
    error_body,
    response_body,
    status_of,
)
from medusa_runtime.openai_format.token_texts import TokenPlace
from medusa_runtime.results import Choice, GenerationResult, Logprob, Times, TokenLogprobs

WORDS = {1: "Hel", 2: "lo", 3: "\ufffd", 4: "lo", 5: "\ufffd", 6: " x"}
PARTS = {3: b"\xe2\x82", 5: b" \\\xac"}  # bytes of tokens that are no text alone
FACTS = ResponseFacts(id="77", created=1_700_000_000, model="tiny", system_fingerprint="abcdef")


class Texts:
    """A tokenizer that drops the space in front of a text, as Llama 2's does."""

    def __call__(self, token_id, *, is_first=False):
        text = WORDS[token_id].lstrip(" " if is_first else "")
        return text, PARTS.get(token_id, text.encode())

    def places(self, token_ids, *, skip_special_tokens=True):
        offsets = accumulate((len(WORDS[token]) for token in token_ids[:-1]), initial=0)
        return [TokenPlace(offset, index == 0) for index, offset in enumerate(offsets)]


texts = Texts()


def choice(index, tokens, logprobs=None, **ends):
    text = "".join(WORDS[token] for token in tokens)
    ends = {"finish_reason": "stop", "stop_reason": None} | ends
    return Choice(
        index=index, text=text, token_ids=tuple(tokens), logprobs=logprobs, steps=1, accepted_by_depth=(1,),
        drafted_by_depth=(1,), decode_seconds=0.1, **ends,
    )  # fmt: skip


def result(*choices):
    return GenerationResult((5, 6, 7), choices, 9, "tree-4", "lossless", Times(0, 0.1, 0.2, 0.3), cached_tokens=2)


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
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 3,
            "total_tokens": 6,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
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
                "tokens": ["Hel", "bytes:\\xe2\\x82"],
                "token_logprobs": [-0.5, -9999.0],
                "top_logprobs": [{"Hel": -0.5, "lo": -1.0}, {"lo": -0.25, "bytes:\\xe2\\x82": -9999.0}],
                "text_offset": [0, 3],
            },
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert response_body(COMPLETIONS, result(choice(0, [1])), FACTS, texts)["choices"][0]["logprobs"] is None


def top_logprobs(*found):
    body = response_body(COMPLETIONS, result(choice(0, [one.token_id for one in found], found)), FACTS, texts)
    return body["choices"][0]["logprobs"]["top_logprobs"]


def test_parts_of_characters_have_names_of_their_own() -> None:
    most_likely = (Logprob(3, -0.5), Logprob(5, -1.0))  # U+FFFD both
    expected = {"bytes:\\xe2\\x82": -0.5, "bytes: \\x5c\\xac": -1.0}
    assert top_logprobs(TokenLogprobs(5, -1.0, most_likely)) == [expected]


def test_of_tokens_with_one_text_the_chosen_one_counts_then_the_most_likely_one() -> None:
    most_likely = (Logprob(2, -0.25), Logprob(4, -2.0))  # "lo" both
    found = top_logprobs(TokenLogprobs(4, -2.0, most_likely), TokenLogprobs(1, -9.0, most_likely))
    assert found == [{"lo": -2.0}, {"lo": -0.25, "Hel": -9.0}]


def test_the_first_token_and_its_alternatives_are_read_as_the_first_ones() -> None:
    most_likely = (Logprob(6, -0.25), Logprob(2, -2.0))
    tokens = tuple(TokenLogprobs(6, -0.25, most_likely) for _ in range(2))
    assert top_logprobs(*tokens) == [{"x": -0.25, "lo": -2.0}, {" x": -0.25, "lo": -2.0}]
    body = response_body(CHAT, result(choice(0, [6, 6], tokens)), FACTS, texts)
    content = body["choices"][0]["logprobs"]["content"]
    assert [(one["token"], bytes(one["bytes"])) for one in content] == [("x", b"x"), (" x", b" x")]
    assert [one["top_logprobs"][0]["token"] for one in content] == ["x", " x"]


def test_offsets_are_those_of_the_text_of_real_answers(tiny_bundle) -> None:
    """Whatever ends the text: end tokens, stop strings, parts of characters, special tokens that are left out."""
    with Engine.load(tiny_bundle, threads=1) as engine:
        read = TokenTexts(engine.tokenizer)
        for seed in range(12):
            for more in ({}, {"stop": ["e", " a"]}, {"skip_special_tokens": False}):
                params = SamplingParams(temperature=2, seed=seed, logprobs=1, max_tokens=30, **more)
                found = engine.generate("Hi", params)
                skip = params.skip_special_tokens
                body = response_body(COMPLETIONS, found, FACTS, read, skip_special_tokens=skip)["choices"][0]
                text, tokens, offsets = body["text"], body["logprobs"]["tokens"], body["logprobs"]["text_offset"]
                assert offsets == sorted(offsets) and 0 <= offsets[0] <= offsets[-1] <= len(text)
                for token, offset, token_id in zip(tokens, offsets, found.token_ids, strict=True):
                    is_shown = engine.tokenizer.token(token_id, skip_special_tokens=skip)
                    if is_shown and not token.startswith("bytes:"):
                        rest = text[offset:].lstrip("\ufffd")
                        assert rest.startswith(token) or token.startswith(rest)  # which a stop string has cut


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
        (QueueFullError("x"), False, 429, "queue_full"),
        (DeadlineError("x"), True, 504, "deadline_exceeded"),
        (RequestCancelledError("x"), True, 500, None),
        (EngineClosedError("x"), True, 503, "engine_closed"),
        (EngineClosedError("x"), False, 503, "engine_closed"),
        (InvalidLogitsError("x"), True, 500, None),
    ],
)
def test_errors(error, generating, status, code) -> None:
    assert status_of(error, generating=generating) == status
    kind = {400: "invalid_request_error", 429: "rate_limit_error"}.get(status, "server_error")
    assert error_body(error, status) == {"error": {"message": "x", "type": kind, "param": None, "code": code}}


@pytest.mark.parametrize(
    "kind", [TemplateProcessError, BundleError, BackendError, CalibrationError, MedusaError, OSError, ZeroDivisionError]
)
def test_messages_that_may_have_paths_are_not_for_clients(kind) -> None:
    error = kind("/srv/secret/bundle is damaged")
    assert status_of(error) == 500
    assert error_body(error, 500)["error"] == {
        "message": f"the server failed to answer ({kind.__name__}); ask its operator for the reason",
        "type": "server_error",
        "param": None,
        "code": None,
    }


def test_an_unknown_tree_of_a_request_shows_no_path(tiny_bundle) -> None:
    with Engine.load(tiny_bundle, threads=1) as engine, pytest.raises(MedusaError) as caught:
        engine.submit("Hi", SamplingParams(profile="oak"))
    body = error_body(caught.value, status_of(caught.value))
    assert str(tiny_bundle) not in str(body) and str(tiny_bundle.resolve()) not in str(body)
