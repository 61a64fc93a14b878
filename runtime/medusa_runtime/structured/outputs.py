"""What an answer has to match: one of a JSON schema, a regular expression, a list of choices, or a grammar."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from medusa_profiles.profile import shown

from medusa_runtime.arguments import as_bool
from medusa_runtime.errors import ArgumentError, PromptError
from medusa_runtime.json_values import JsonCopier
from medusa_runtime.parameter_checks import as_texts
from medusa_runtime.parameter_names import checked_names
from medusa_runtime.strict_json import describe_json_error

MAX_LENGTH = 65_536  # characters of a schema or grammar: its compiler recurses once for a few of them
MAX_REGEX_LENGTH = 8192  # characters of a regular expression, which takes up to half a second to compile
UNSUPPORTED = ("disable_additional_properties", "structural_tag", "whitespace_pattern")
_KINDS = ("json", "regex", "choice", "grammar", "json_object")


@checked_names(UNSUPPORTED)
@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """What an answer has to match; exactly one of the first five fields is set. Field names are those of vLLM.

    Example::

        StructuredOutputs(json={"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]})
        StructuredOutputs(regex="[0-9]{4}-[0-9]{2}-[0-9]{2}")
        StructuredOutputs(choice=["positive", "negative"])

    Args:
        json: A JSON schema: a mapping, or its JSON as text, which is what becomes of a mapping too. Properties are
            written in the order of the schema.
        regex: A regular expression in the syntax of Rust's crate `regex`, which the whole answer matches.
        choice: Texts, one of which is the answer.
        grammar: A context-free grammar in llguidance's variant of Lark's syntax.
        json_object: Whether the answer is a JSON object, of any content.
        disable_any_whitespace: Whether JSON is written without white space between its parts. Then more of its tokens
            are determined by the schema, and answers are shorter.

    Raises:
        ArgumentError: No field is set or several are, or a value has a wrong type or is too long. Whether a schema,
            regular expression or grammar is valid is found out when a request is submitted.
    """

    json: str | Mapping[str, object] | None = None
    regex: str | None = None
    choice: Collection[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        """Check every field and normalise it: a schema becomes text, choices a tuple, `json_object` True or None."""
        values = {
            "json": None if self.json is None else _schema(self.json),
            "regex": None if self.regex is None else _text("regex", self.regex, MAX_REGEX_LENGTH),
            "choice": None if self.choice is None else _choices(self.choice),
            "grammar": None if self.grammar is None else _text("grammar", self.grammar, MAX_LENGTH),
            "json_object": None if self.json_object is None else as_bool(_of("json_object"), self.json_object) or None,
            "disable_any_whitespace": as_bool(_of("disable_any_whitespace"), self.disable_any_whitespace),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        used = [name for name in _KINDS if getattr(self, name) is not None]
        if len(used) != 1:
            got = " and ".join(used) if used else "none of its fields"
            raise ArgumentError(f"structured_outputs sets {got}; expected exactly one of {', '.join(_KINDS)}")
        if self.disable_any_whitespace and used[0] not in ("json", "json_object"):
            raise ArgumentError(
                f"structured_outputs sets disable_any_whitespace with {used[0]}; expected json or json_object: leave "
                "disable_any_whitespace out"
            )

    @classmethod
    def of_optional(cls, value: object) -> StructuredOutputs | None:
        """Return structured outputs, those that a mapping of the same fields describes, or None.

        Raises:
            ArgumentError: The value is neither, or a field is unknown or invalid.
        """
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ArgumentError(
                f"structured_outputs is {shown(value)}, of type {type(value).__name__}; expected StructuredOutputs, or "
                "a mapping of its fields"
            )
        fields = {field.name for field in dataclasses.fields(cls)}
        stated = {name: one for name, one in value.items() if one is not None or name not in {*fields, *UNSUPPORTED}}
        for name in stated:
            if name not in fields:
                raise ArgumentError(
                    f"structured_outputs has the field {shown(name)}, which medusa-export does not support; expected "
                    f"some of {', '.join(sorted(fields))}"
                )
        return cls(**stated)

    @property
    def kind(self) -> str:
        """The field that is set."""
        return next(name for name in _KINDS if getattr(self, name) is not None)


def _schema(value: object) -> str:
    """Return the JSON text of a schema, whose root is an object."""
    if isinstance(value, str):
        text = _text("json", value, MAX_LENGTH)
        try:
            content = json.loads(text)
        except (ValueError, RecursionError, MemoryError) as error:
            fault = describe_json_error(error)
            raise ArgumentError(f"{_of('json')} is not valid JSON: {fault}; expected a JSON schema") from None
        if isinstance(content, dict):
            return text
    elif isinstance(value, Mapping):
        try:
            text = json.dumps(JsonCopier().copy(_of("json"), value), ensure_ascii=False)
        except PromptError as error:
            raise ArgumentError(str(error)) from None
        return _text("json", text, MAX_LENGTH)
    raise ArgumentError(
        f"{_of('json')} is {shown(value)}, of type {type(value).__name__}; expected a JSON schema, as a mapping or as "
        "JSON text"
    )


def _choices(value: object) -> tuple[str, ...]:
    found = as_texts(_of("choice"), value)
    if not found:
        raise ArgumentError(f"{_of('choice')} is empty; expected at least one text")
    return found


def _text(what: str, value: object, most: int) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= most:
        got = f"{len(value)} characters long" if isinstance(value, str) else f"{shown(value)}"
        raise ArgumentError(f"{_of(what)} is {got}; expected a text of 1 to {most} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ArgumentError(
            f"{_of(what)} is {shown(value)}, which is not valid Unicode; remove lone surrogates"
        ) from None
    return str.__str__(value)


def _of(field: str) -> str:
    return f"{field} of structured_outputs"
