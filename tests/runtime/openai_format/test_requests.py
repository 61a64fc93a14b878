"""Bodies of OpenAI's API become prompts, options and parameters, or an error that names the field."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from medusa_runtime.errors import ArgumentError
from medusa_runtime.openai_format import CHAT, COMPLETIONS, BodyError, error_body, read_request, status_of
from medusa_runtime.openai_format.fields import _IGNORED, _NOT_SUPPORTED, _OF_THE_OPERATOR, _ONLY, _READ, PARAMETERS
from medusa_runtime.sampling_params import SamplingParams

MESSAGES = [{"role": "user", "content": "Hi"}]


def chat(defaults=None, /, *, sanitize=False, chat_template_arguments=None, **fields):
    body = {"messages": MESSAGES, **fields}
    return read_request(CHAT, body, defaults, sanitize=sanitize, chat_template_arguments=chat_template_arguments)


def complete(defaults=None, /, **fields):
    return read_request(COMPLETIONS, {"prompt": "Once", **fields}, defaults)


def refused(url, body):
    with pytest.raises(BodyError) as caught:
        read_request(url, body)
    return caught.value


def test_the_least_body_has_our_defaults() -> None:
    found = chat()
    assert (found.url, found.model, found.prompt, found.options) == (CHAT, None, MESSAGES, {})
    assert found.params == SamplingParams()
    found = complete(model="gpt")
    assert (found.url, found.model, found.prompt, found.options) == (COMPLETIONS, "gpt", "Once", {"raw": True})
    assert found.params == SamplingParams()


def test_every_parameter_is_passed_on_by_its_name() -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "n": 2, "stop": ["a", "b"],
        "stop_token_ids": [4, 5], "include_stop_str_in_output": True, "ignore_eos": True, "min_tokens": 2,
        "skip_special_tokens": False, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": -0.4,
        "logit_bias": {"5": -100, "7": 2.5}, "allowed_token_ids": [5, 6], "bad_words": ["no"],
        "truncate_prompt_tokens": -1,
    }  # fmt: skip
    assert fields.keys() == set(PARAMETERS) - {"structured_outputs"}
    expected = SamplingParams(**{**fields, "logit_bias": {5: -100, 7: 2.5}})
    assert chat(**fields).params == complete(**fields).params == expected
    assert chat(stop="x").params.stop == ("x",)


def test_null_and_absent_fields_have_the_callers_defaults() -> None:
    defaults = SamplingParams(temperature=0.7, max_tokens=9, stop=["."], logprobs=3, n=2)
    nulls = dict.fromkeys([*PARAMETERS, "max_tokens", "logprobs"])
    assert chat(defaults, **nulls, tools=None, tool_choice=None, stream=None).params == defaults
    assert complete(defaults, **nulls, echo=None, best_of=None).params == defaults
    assert chat(defaults, n=1, max_tokens=5).params == SamplingParams(
        temperature=0.7, max_tokens=5, stop=["."], logprobs=3
    )
    assert chat(defaults, logprobs=False).params.logprobs is None


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 7, "max_completion_tokens": 7}, 7),
        ({"max_tokens": None, "max_completion_tokens": 8}, 8),
    ],
)
def test_the_limit_has_two_names(fields, limit) -> None:
    assert chat(**fields).params.max_tokens == limit


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 5}, 5),
    ],
)
def test_log_probabilities_of_a_chat(fields, count) -> None:
    assert chat(**fields).params.logprobs == count


def test_prompts_of_completions() -> None:
    for prompt, options in (("a", {"raw": True}), ([1, 2], {}), (["a"], {"raw": True}), ([[1, 2]], {})):
        found = complete(prompt=prompt)
        assert found.options == options
        assert found.prompt in ("a", [1, 2])


def test_options_of_a_chats_prompt() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert chat(tools=tools).options == chat(tools=tools, tool_choice="auto").options == {"tools": tools}
    assert chat(tools=tools, tool_choice="none").options == {}
    for extra in ({}, {"add_generation_prompt": False}):
        assert chat(continue_final_message=True, **extra).options == {"continue_final_message": True}
    assert chat(continue_final_message=False, add_generation_prompt=True).options == {}
    found = chat(chat_template_arguments={"a": 1, "b": 2}, sanitize=True, chat_template_kwargs={"b": 3})
    assert found.options == {"chat_template_arguments": {"a": 1, "b": 3}, "sanitize": True}


@pytest.mark.parametrize(
    ("url", "fields", "param", "words"),
    [
        (CHAT, {"messages": None}, "messages", "messages is None; expected a list of messages"),
        (CHAT, {"messages": "Hi"}, "messages", "expected a list of messages"),
        (CHAT, {"messages": [1, 2]}, "messages", "expected a list of messages"),  # which are token ids elsewhere
        (CHAT, {"prompt": "Hi"}, "prompt", "unknown parameter 'prompt'; expected some of add_generation_prompt"),
        (CHAT, {"tempperature": 1}, "tempperature", "unknown parameter 'tempperature'"),
        (CHAT, {"\ud800": 1}, "\ud800", "unknown parameter"),
        (CHAT, {"stream": True}, "stream", "stream is True, which medusa-export does not support; expected False"),
        (CHAT, {"stream": 0}, "stream", "stream is 0"),
        (CHAT, {"parallel_tool_calls": False}, "parallel_tool_calls", "expected True"),
        (CHAT, {"modalities": ["text", "audio"]}, "modalities", "expected ['text']"),
        (CHAT, {"audio": {}}, "audio", "'audio' is a parameter that medusa-export does not support"),
        (CHAT, {"functions": []}, "functions", "'functions' is a parameter that medusa-export does not support"),
        (CHAT, {"guided_decoding": {}}, "guided_decoding", "expected structured_outputs, with one of the fields json"),
        (CHAT, {"tool_choice": "required"}, "tool_choice", "expected 'auto', or 'none'"),
        (CHAT, {"tool_choice": {"type": "function"}}, "tool_choice", "expected 'auto', or 'none'"),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "two names of one limit"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens is 0; expected at"),
        (CHAT, {"max_completion_tokens": 5, "min_tokens": 6}, None, "6 and max_completion_tokens 5; expected"),
        (CHAT, {"max_completion_tokens": 5, "min_tokens": "max_tokens"}, "min_tokens", "is 'max_tokens', of type str"),
        (CHAT, {"logprobs": 5}, "logprobs", "logprobs is 5, of type int; expected True or False"),
        (CHAT, {"top_logprobs": 5}, "top_logprobs", "expected logprobs: true"),
        (CHAT, {"logprobs": True, "top_logprobs": 65}, "top_logprobs", "top_logprobs is 65; expected at most 64"),
        (CHAT, {"logprobs": True, "top_logprobs": "x"}, "top_logprobs", "top_logprobs is 'x'"),
        (CHAT, {"profile": "tree-4"}, "profile", "an option of the command that answers it: leave it out, and choose "
            "it with --profile"),
        (COMPLETIONS, {"acceptance": "typical"}, "acceptance", "leave it out, and choose it with --acceptance"),
        (CHAT, {"logprobs": True, "top_logprobs": True}, "top_logprobs", "expected a whole number"),
        (CHAT, {"add_generation_prompt": False}, "add_generation_prompt", "both false"),
        (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt", "both true"),
        (CHAT, {"continue_final_message": "yes"}, "continue_final_message", "expected True or False"),
        (CHAT, {"chat_template_kwargs": []}, "chat_template_kwargs", "expected an object"),
        (CHAT, {"model": 5}, "model", "model is 5, of type int; expected a text"),
        (CHAT, {"model": "\udcff"}, "model", "expected a text"),
        (CHAT, {"top_p": 3, "temperature": 1}, "top_p", "top_p is 3"),
        (CHAT, {"temperature": "hot"}, "temperature", "temperature is 'hot', of type str; expected a number"),
        (CHAT, {"min_tokens": 9, "max_tokens": 5}, None, "min_tokens is 9 and max_tokens 5"),
        (COMPLETIONS, {"prompt": None}, "prompt", "expected one text or one list of token ids"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "prompt", "send a request for each prompt"),
        (COMPLETIONS, {"prompt": [1, "b"]}, "prompt", "expected one text or one list of token ids"),
        (COMPLETIONS, {"prompt": [{"role": "user"}]}, "prompt", "expected one text or one list of token ids"),
        (COMPLETIONS, {"prompt": {}}, "prompt", "expected one text or one list of token ids"),
        (COMPLETIONS, {"logprobs": True}, "logprobs", "expected a whole number"),
        (COMPLETIONS, {"echo": True}, "echo", "expected False"),
        (COMPLETIONS, {"best_of": True}, "best_of", "expected 1"),
        (COMPLETIONS, {"suffix": "end"}, "suffix", "expected ''"),
        (COMPLETIONS, {"messages": MESSAGES}, "messages", "unknown parameter 'messages'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(url, fields, param, words) -> None:
    error = refused(url, ({"messages": MESSAGES} if url == CHAT else {"prompt": "Once"}) | fields)
    assert words in str(error)
    assert error.param == param
    body = error_body(error, status_of(error))["error"]
    assert (body["type"], body["param"], body["code"]) == ("invalid_request_error", param, None)


def test_what_is_harmless_is_accepted() -> None:
    harmless = dict.fromkeys(_IGNORED, "any") | _ONLY
    assert chat(**harmless) == chat()
    assert complete(**harmless) == complete()
    assert chat(**dict.fromkeys(_NOT_SUPPORTED)) == chat()


def test_every_field_has_one_meaning() -> None:
    for read in _READ.values():
        groups = [
            {"model", *PARAMETERS},
            set(read),
            set(_IGNORED),
            set(_ONLY),
            set(_NOT_SUPPORTED),
            set(_OF_THE_OPERATOR),
        ]
        assert sum(map(len, groups)) == len(set().union(*groups))


@pytest.mark.parametrize("body", [[1], None, "x", 5, True, b"{}"])
@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
def test_a_body_is_an_object(url, body) -> None:
    error = refused(url, body)
    assert str(error).startswith("the body is ") and str(error).endswith("; expected a JSON object")
    assert error.param is None


def test_names_that_are_no_texts_are_refused() -> None:
    error = refused(CHAT, {1: 2})
    assert (str(error)[:19], error.param) == ("unknown parameter 1", "1")


@pytest.mark.parametrize("field", ["temperature", "stop", "logit_bias", "messages", "prompt", "response_format", "new"])
def test_bodies_that_are_too_deep_to_be_shown_are_refused(field) -> None:
    for depth in (101, 900, 5000):
        value = []
        for _ in range(depth):
            value = [value]
        assert "more than 100 deep" in str(refused(CHAT, {field: value}))
        assert "more than 100 deep" in str(refused(COMPLETIONS, {field: {"a": value}}))


def test_another_url_is_refused() -> None:
    with pytest.raises(ArgumentError, match="expected /v1/chat/completions or /v1/completions"):
        read_request("/v1/embeddings", {})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)
NAMES = sorted({"model", *PARAMETERS, *(name for read in _READ.values() for name in read), *_ONLY, *_NOT_SUPPORTED})


@settings(max_examples=300, deadline=None)
@given(url=st.sampled_from([CHAT, COMPLETIONS]), body=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4))
def test_any_body_is_read_or_refused_with_its_field(url, body) -> None:
    needed = {"messages": MESSAGES} if url == CHAT else {"prompt": "Once"}
    try:
        found = read_request(url, needed | body)
    except BodyError as error:
        assert error.param is None or error.param in body
        assert status_of(error) == 400
    else:
        assert isinstance(found.params, SamplingParams)
