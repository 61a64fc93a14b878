"""Schemas that would take too much memory to compile are refused by what they contain."""

import json

import pytest
from medusa_runtime.errors import ArgumentError
from medusa_runtime.structured.schema_limits import check_grammar, check_schema

LARGE = [
    {"multipleOf": 999983},
    {"multipleOf": 99999.1},
    {"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]},
    {"type": "array", "items": {"anyOf": [{"properties": {"a": {"multipleOf": 2 * 999983}}}]}},
    {"$defs": {"a": {"multipleOf": 10**40 + 1}}},
    {"multipleOf": -999983},
]
SMALL = [
    {},
    {"multipleOf": 1_000_000},
    {"multipleOf": 0.0001},
    {"multipleOf": 1e300},
    {"multipleOf": 0},
    {"allOf": [{"multipleOf": 12}, {"multipleOf": 30}, {"multipleOf": 7}]},
    {"properties": {"multipleOf": {"type": "string"}}},
    {"const": {"multipleOf": 999983}},
    {"enum": [{"multipleOf": 999983}]},
    {"multipleOf": True},
    {"properties": {"x-guidance": {"type": "string"}}},
]


@pytest.mark.parametrize("schema", LARGE, ids=str)
def test_large_multiples_are_refused(schema):
    with pytest.raises(ArgumentError, match=r"^json of structured_outputs has multipleOf .*; expected at most 20000"):
        check_schema(json.dumps(schema))
    grammar = f"start: %json {json.dumps(schema)}"
    for text in (grammar, grammar.replace("m", "\\u006d").replace("%js", "%js")):
        with pytest.raises(ArgumentError, match=r"^grammar of structured_outputs has multipleOf "):
            check_grammar(text)


@pytest.mark.parametrize("schema", SMALL, ids=str)
def test_small_ones_and_documents_are_not(schema):
    check_schema(json.dumps(schema))
    check_grammar('start: "multipleOf" /[0-9]+/')


def test_options_of_the_library_are_refused():
    with pytest.raises(ArgumentError, match="has the keyword x-guidance, which changes what documents match; expected"):
        check_schema('{"x-guidance": {}}')
