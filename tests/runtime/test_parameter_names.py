"""Names that are no fields of SamplingParams are refused by its constructor and by from_dict, with a hint."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from medusa_runtime.errors import ArgumentError
from medusa_runtime.parameter_names import OTHER_NAMES
from medusa_runtime.sampling_params import UNSUPPORTED, SamplingParams

FIELDS = [field.name for field in dataclasses.fields(SamplingParams)]
CREATE: list[Callable[[dict[str, Any]], SamplingParams]] = [
    SamplingParams.from_dict,
    lambda fields: SamplingParams(**fields),
    lambda fields: dataclasses.replace(SamplingParams(), **fields),
]


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_built_is_refused_by_name(name: str) -> None:
    for create in CREATE:
        with pytest.raises(ArgumentError, match=f"'{name}' is a parameter that medusa-export does not support"):
            create({name: 1})
    assert SamplingParams.from_dict({name: None, "seed": 3}) == SamplingParams(seed=3)


@pytest.mark.parametrize("create", CREATE)
def test_unknown_fields_are_refused_with_those_that_there_are(create: Callable[[dict[str, Any]], Any]) -> None:
    for value in (1, None):
        with pytest.raises(ArgumentError, match=r"unknown parameter 'temprature'; expected some of .*temperature"):
            create({"temprature": value})
    with pytest.raises(ArgumentError, match="unknown parameter 'max_new_tokens'; expected max_tokens in its place"):
        create({"max_new_tokens": 5})


def test_names_of_json_may_be_anything() -> None:
    name: Any
    for name in (5, 10**5000, "x" * 10**6, (10**5000,)):
        with pytest.raises(ArgumentError, match=r"unknown parameter .*; expected some of") as found:
            SamplingParams.from_dict({name: 1})
        assert len(str(found.value)) < 500


def test_names_of_other_programs_stand_for_a_field() -> None:
    assert set(FIELDS).isdisjoint([*OTHER_NAMES, *UNSUPPORTED])
    assert {meant.partition(",")[0] for meant in OTHER_NAMES.values()} <= set(FIELDS)


def test_the_constructor_has_the_signature_of_the_fields() -> None:
    assert list(inspect.signature(SamplingParams).parameters) == FIELDS
    with pytest.raises(TypeError, match="positional"):
        SamplingParams(5)  # type: ignore[misc]
