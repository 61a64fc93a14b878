"""`response_format` and `structured_outputs` of a body say what the answer has to match."""

import pytest
from medusa_runtime.openai_format import CHAT, COMPLETIONS, BodyError, read_request
from medusa_runtime.sampling_params import SamplingParams
from medusa_runtime.structured.outputs import StructuredOutputs

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"const": "é"}}}
BODIES = {CHAT: {"messages": [{"role": "user", "content": "Hi"}]}, COMPLETIONS: {"prompt": "Once"}}


def outputs_of(url=CHAT, defaults=None, **fields):
    return read_request(url, BODIES[url] | fields, defaults).params.structured_outputs


def refused(url=CHAT, **fields):
    with pytest.raises(BodyError) as caught:
        read_request(url, BODIES[url] | fields)
    return caught.value


@pytest.mark.parametrize("url", BODIES)
def test_formats_of_answers(url):
    described = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    assert outputs_of(url, response_format=described) == StructuredOutputs(json=SCHEMA)
    assert outputs_of(url, response_format={"type": "json_object"}) == StructuredOutputs(json_object=True)
    assert outputs_of(url, response_format={"type": "text"}) is None
    assert outputs_of(url, response_format=None) is None
    assert outputs_of(url, structured_outputs={"regex": "a+"}) == StructuredOutputs(regex="a+")
    both = outputs_of(url, structured_outputs={"choice": ["a", "b"]}, response_format={"type": "text"})
    assert both == StructuredOutputs(choice=["a", "b"])


def test_a_body_overrides_the_callers_default():
    defaults = SamplingParams(structured_outputs={"regex": "a+"})
    assert outputs_of(defaults=defaults) == StructuredOutputs(regex="a+")
    assert outputs_of(defaults=defaults, response_format={"type": "text"}) is None
    assert outputs_of(defaults=defaults, structured_outputs={"regex": "b"}) == StructuredOutputs(regex="b")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("json", "response_format is 'json'; expected an object with the type 'text', 'json_object' or 'json_schema'"),
        ([], "expected an object with the type"),
        ({}, "type of response_format is None; expected 'text'"),
        ({"type": ["text"]}, "type of response_format is"),
        ({"type": "regex"}, "type of response_format is 'regex'"),
        ({"type": "text", "schema": {}}, "response_format has the field 'schema'; expected some of type"),
        (
            {"type": "json_schema"},
            "json_schema of response_format is None; expected an object with a name and a schema",
        ),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "expected an object with a name and a schema"),
        ({"type": "json_schema", "json_schema": {"schema": "{}"}}, "expected an object with a name and a schema"),
        (
            {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}},
            "json_schema of response_format has the field",
        ),
        (
            {"type": "json_schema", "json_schema": {"schema": {"const": "x" * 70_000}}},
            "schema of response_format is refused: json of structured_outputs is 70013 characters long",
        ),
    ],
)
def test_other_formats_are_refused(value, words):
    error = refused(response_format=value)
    assert words in str(error) and error.param == "response_format"


def test_structured_outputs_that_are_invalid_are_named():
    error = refused(structured_outputs={"regex": "a", "choice": ["b"]})
    assert "structured_outputs sets regex and choice" in str(error) and error.param == "structured_outputs"
    error = refused(structured_outputs={"regex": "a"}, response_format={"type": "json_object"})
    assert "both set" in str(error) and error.param == "response_format"
    error = refused(structured_outputs={"regex": "a"}, ignore_eos=True)
    assert "ignore_eos is True with structured_outputs" in str(error) and error.param is None
