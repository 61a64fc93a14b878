"""Reads `response_format` of OpenAI's API: what an answer has to match."""

from __future__ import annotations

from collections.abc import Mapping

from medusa_profiles.profile import shown

from medusa_runtime.errors import ArgumentError
from medusa_runtime.openai_format.failures import BodyError
from medusa_runtime.structured.outputs import StructuredOutputs

NAME = "response_format"
_SCHEMA_FIELDS = ("name", "schema", "description", "strict")  # all but the schema are ignored
_TYPES = "'text', 'json_object' or 'json_schema'"


def read_response_format(value: object) -> StructuredOutputs | None:
    """Return what the answer has to match; None for a text of any kind.

    A schema is always followed strictly, whatever `strict` is.

    Raises:
        BodyError: The value is of another form.
    """
    if not isinstance(value, Mapping):
        raise BodyError(f"{NAME} is {shown(value)}; expected an object with the type {_TYPES}", NAME)
    kind = value.get("type")
    expected = ("type", "json_schema") if kind == "json_schema" else ("type",)
    if kind not in ("text", "json_object", "json_schema"):
        raise BodyError(f"type of {NAME} is {shown(kind)}; expected {_TYPES}", NAME)
    _check_names(value, NAME, expected)
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputs(json_object=True)
    described = value.get("json_schema")
    if not isinstance(described, Mapping) or not isinstance(described.get("schema"), Mapping):
        raise BodyError(
            f"json_schema of {NAME} is {shown(described)}; expected an object with a name and a schema", NAME
        )
    _check_names(described, f"json_schema of {NAME}", _SCHEMA_FIELDS)
    try:
        return StructuredOutputs(json=described["schema"])
    except ArgumentError as error:
        raise BodyError(f"schema of {NAME} is refused: {error}", NAME) from None


def _check_names(fields: Mapping[object, object], what: str, expected: tuple[str, ...]) -> None:
    for name in fields:
        if name not in expected:
            raise BodyError(f"{what} has the field {shown(name)}; expected some of {', '.join(expected)}", NAME)
