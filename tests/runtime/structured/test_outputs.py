"""Structured outputs are checked when they are created, and what they are given in becomes one form."""

import json

import numpy as np
import pytest
from medusa_runtime.errors import ArgumentError
from medusa_runtime.sampling_params import SamplingParams
from medusa_runtime.structured.outputs import MAX_LENGTH, MAX_REGEX_LENGTH, UNSUPPORTED, StructuredOutputs

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"const": "é"}}}


def test_a_schema_keeps_the_order_of_its_properties():
    text = json.dumps(SCHEMA, ensure_ascii=False)
    assert StructuredOutputs(json=SCHEMA) == StructuredOutputs(json=text)
    assert list(json.loads(StructuredOutputs(json=SCHEMA).json)["properties"]) == ["b", "a"]
    assert len({StructuredOutputs(json=SCHEMA), StructuredOutputs(json=text), StructuredOutputs(regex="a")}) == 2


def test_every_kind_has_one_form():
    assert StructuredOutputs(choice=["a", "b"]).choice == ("a", "b")
    assert StructuredOutputs(json_object=np.True_).json_object is True
    assert [one.kind for one in (StructuredOutputs(grammar="start: A"), StructuredOutputs(json={}))] == [
        "grammar",
        "json",
    ]
    assert StructuredOutputs(regex="a", json_object=False) == StructuredOutputs(regex="a")


def test_parameters_accept_a_mapping_as_json_has_it():
    params = SamplingParams.from_dict({"structured_outputs": {"choice": ["a"], "json": None, "structural_tag": None}})
    assert params == SamplingParams(structured_outputs=StructuredOutputs(choice=["a"]))
    assert params.has_processors and not SamplingParams().has_processors
    assert SamplingParams.from_dict({"structured_outputs": None}) == SamplingParams()
    assert StructuredOutputs.of_optional(params.structured_outputs) is params.structured_outputs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "structured_outputs sets none of its fields; expected exactly one of json, regex, choice"),
        ({"json": {}, "regex": "a"}, "structured_outputs sets json and regex; expected exactly one"),
        ({"json_object": False}, "sets none of its fields"),
        ({"json": 5}, "json of structured_outputs is 5, of type int; expected a JSON schema, as a mapping"),
        ({"json": "[1]"}, "json of structured_outputs is '.1.', of type str; expected a JSON schema"),
        ({"json": "{"}, "json of structured_outputs is not valid JSON: .*; expected a JSON schema"),
        ({"json": "[" * 60_000}, "json of structured_outputs is not valid JSON"),
        ({"json": {"enum": [{1}]}}, "json of structured_outputs holds a value that JSON cannot represent"),
        ({"json": {"const": float("nan")}}, "json of structured_outputs holds a value that JSON cannot represent"),
        (
            {"json": {"const": "x" * MAX_LENGTH}},
            f"json of structured_outputs is .* characters long; expected a text of 1 to {MAX_LENGTH}",
        ),
        (
            {"regex": ""},
            f"regex of structured_outputs is 0 characters long; expected a text of 1 to {MAX_REGEX_LENGTH} characters",
        ),
        ({"regex": "a" * (MAX_REGEX_LENGTH + 1)}, "regex of structured_outputs is 8193 characters long"),
        ({"regex": "\ud800"}, "not valid Unicode"),
        ({"regex": 5}, "regex of structured_outputs is 5; expected a text"),
        ({"grammar": "x" * (MAX_LENGTH + 1)}, "grammar of structured_outputs is 65537 characters long"),
        ({"choice": "a"}, "choice of structured_outputs is 'a', of type str; expected a list of texts"),
        ({"choice": []}, "choice of structured_outputs is empty; expected at least one text"),
        ({"choice": ["a", ""]}, "choice of structured_outputs holds ''; expected texts of 1 to"),
        ({"json_object": 1}, "json_object of structured_outputs is 1, of type int; expected True or False"),
        ({"regex": "a", "disable_any_whitespace": True}, "sets disable_any_whitespace with regex; expected json or"),
        ({"regexp": "a"}, "'regexp'.*; expected some of choice"),
        *(
            ({"regex": "a", name: True}, f"{name!r}.* that medusa-export does not|{name!r}, which")
            for name in UNSUPPORTED
        ),
    ],
)
def test_what_is_wrong_is_named(fields, message):
    for create in (
        lambda: StructuredOutputs(**fields),
        lambda: SamplingParams(structured_outputs=fields),
        lambda: SamplingParams.from_dict({"structured_outputs": fields}),
    ):
        with pytest.raises(ArgumentError, match=message):
            create()


@pytest.mark.parametrize("value", ["json", 5, True, [("regex", "a")], b"{}"])
def test_other_types_are_refused(value):
    with pytest.raises(ArgumentError, match=r"structured_outputs is .*; expected StructuredOutputs, or a mapping"):
        SamplingParams(structured_outputs=value)


def test_what_does_not_go_together_is_refused():
    outputs = {"regex": "a+"}
    with pytest.raises(ArgumentError, match=r"structured_outputs is .* with acceptance 'typical'"):
        SamplingParams(structured_outputs=outputs, acceptance="typical")
    with pytest.raises(ArgumentError, match="ignore_eos is True with structured_outputs; expected False"):
        SamplingParams(structured_outputs=outputs, ignore_eos=True)
