"""Parameters of a request: their defaults, their normal form, and what is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import enum
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
from medusa_profiles import TreeProfile
from medusa_profiles.profile import shown
from medusa_runtime.accept import Typical
from medusa_runtime.errors import ArgumentError
from medusa_runtime.sampling_params import SamplingParams

FULL: dict[str, Any] = {
    "max_tokens": 5,
    "min_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 3,
    "min_p": 0.1,
    "seed": 2**64 - 1,
    "n": 2,
    "stop": ["a", "b"],
    "stop_token_ids": [1, 2],
    "include_stop_str_in_output": True,
    "ignore_eos": False,
    "skip_special_tokens": False,
    "logprobs": 3,
    "repetition_penalty": 1.2,
    "presence_penalty": -2,
    "frequency_penalty": 2,
    "logit_bias": {"7": 1, "8": -100},
    "allowed_token_ids": [7, 8, 9],
    "bad_words": ["c"],
    "structured_outputs": {"choice": ["a", "b"], "disable_any_whitespace": False},
    "truncate_prompt_tokens": 9,
    "profile": "tree-4",
    "draft": "heads",
    "acceptance": "lossless",
}


def test_the_defaults_are_greedy_with_256_tokens() -> None:
    params = SamplingParams()
    assert (params.temperature, params.max_tokens, params.n, params.acceptance) == (0.0, 256, 1, "lossless")
    assert params.is_greedy and not params.has_processors and params.logprobs is None


def test_every_field_can_be_read_from_json() -> None:
    assert set(FULL) == {field.name for field in dataclasses.fields(SamplingParams)}
    params = SamplingParams.from_dict(json.loads(json.dumps(FULL)))
    assert params == SamplingParams(**FULL)
    assert (
        params.logit_bias == ((7, 1.0), (8, -100.0)) and params.stop == ("a", "b") and params.stop_token_ids == (1, 2)
    )
    assert SamplingParams.from_dict(dict.fromkeys(FULL)) == SamplingParams()
    assert dataclasses.replace(params, seed=3) == SamplingParams(**FULL | {"seed": 3})


@pytest.mark.parametrize("fields", [None, 5, [], "x", [("seed", 1)]], ids=repr)
def test_json_that_is_no_object_is_refused(fields: Any) -> None:
    with pytest.raises(ArgumentError, match="expected a JSON object"):
        SamplingParams.from_dict(fields)


def test_several_equal_answers_are_refused_as_vllm_does() -> None:
    with pytest.raises(ArgumentError, match="n is 2 with temperature 0; expected n=1"):
        SamplingParams(n=2)


@pytest.mark.parametrize("more", [{}, {"temperature": 1.0}], ids=str)
def test_typical_acceptance_gives_one_answer(more: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="n is 2 with acceptance 'typical'; expected 1"):
        SamplingParams(n=2, acceptance="typical", **more)


@pytest.mark.parametrize("more", [{"profile": "tree-4"}, {"acceptance": "typical"}], ids=str)
@pytest.mark.parametrize("draft", ["auto", "ngram"])
def test_a_draft_that_changes_excludes_what_needs_one_tree(draft: str, more: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=f"draft is '{draft}' with .*; expected 'heads', the same tree in every"):
        SamplingParams(draft=draft, **more)
    assert SamplingParams(draft="heads", **more).draft == "heads"


def test_what_json_kept_can_be_read_again() -> None:
    params = SamplingParams(**FULL)
    assert SamplingParams.from_dict(json.loads(json.dumps(dataclasses.asdict(params)))) == params


@pytest.mark.parametrize("field", FULL)
def test_parameters_do_not_change(field: str) -> None:
    params = SamplingParams(**FULL)
    assert hash(params) == hash(SamplingParams(**FULL))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(params, field, None)
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params


def test_lists_are_copied() -> None:
    stop, bias = ["a"], {3: 1.0}
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("b")
    bias[4] = 2.0
    assert params.stop == ("a",) and params.logit_bias == ((3, 1.0),)


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ({"stop": "end"}, ("stop", ("end",))),
        ({"stop": None}, ("stop", ())),
        ({"bad_words": None}, ("bad_words", ())),
        ({"stop_token_ids": None}, ("stop_token_ids", ())),
        ({"top_k": -1}, ("top_k", 0)),
        ({"temperature": 1}, ("temperature", 1.0)),
        ({"temperature": np.float32(0.5)}, ("temperature", 0.5)),
        ({"max_tokens": np.int64(4)}, ("max_tokens", 4)),
        ({"stop_token_ids": np.array([1, 2])}, ("stop_token_ids", (1, 2))),
        ({"stop_token_ids": {3}}, ("stop_token_ids", (3,))),
        ({"stop": np.array(["a", "b"])}, ("stop", ("a", "b"))),
        ({"logit_bias": [[7, 1], ["8", 2]]}, ("logit_bias", ((7, 1.0), (8, 2.0)))),
        ({"logit_bias": ()}, ("logit_bias", ())),
        ({"acceptance": np.str_("lossless")}, ("acceptance", "lossless")),
        ({"acceptance": "typical"}, ("acceptance", Typical())),
        ({"acceptance": Typical(0.1)}, ("acceptance", Typical(0.1))),
        ({"profile": TreeProfile.plain()}, ("profile", TreeProfile.plain())),
        ({"truncate_prompt_tokens": -1}, ("truncate_prompt_tokens", -1)),
        ({"max_tokens": None}, ("max_tokens", None)),
    ],
    ids=str,
)
def test_values_have_a_normal_form(given: dict[str, Any], normal: tuple[str, Any]) -> None:
    found = getattr(SamplingParams(**given), normal[0])
    assert found == normal[1] and type(found) is type(normal[1])


def test_texts_are_plain_texts() -> None:
    class Name(str, enum.Enum):
        END = "the end"

    params = SamplingParams(stop=[np.str_("a"), Name.END], bad_words=[Name.END])
    assert [type(text) for text in (*params.stop, *params.bad_words)] == [str] * 3
    assert params.stop == ("a", "the end")


WRONG: dict[str, list[Any]] = {
    "draft": ["fast", 1, 10**5000],
    "structured_outputs": [5, "json", [], {}, {"regex": 5}, {"regex": "a", "choice": ["b"]}, {"json": 10**5000}],
    "max_tokens": [0, -1, 1.5, "3", True, -(10**5000), 10**5000],
    "min_tokens": [-1, None, 2.0, 257, 10**5000],
    "temperature": [-0.1, math.nan, math.inf, "1", None, True, 10**400, [10**5000]],
    "top_p": [0, -1, 1.01, math.nan, None],
    "top_k": [-2, 1.5, "3", 10**5000],
    "min_p": [-0.1, 1.1],
    "seed": [-1, 2**64, 1.0, "3", 10**5000],
    "n": [0, 129, None],
    "stop": [
        [""],
        [3],
        b"x",
        5,
        {"a": 1},
        ["a"] * 257,
        ["x" * 1025],
        "",
        ["a", None],
        10**5000,
        [10**5000],
        np.array("a"),
    ],
    "stop_token_ids": [
        [-1],
        ["3"],
        [1.0],
        "12",
        [True],
        {1: 2},
        [10**5000],
        [[10**5000]],
        np.array(3),
        np.array([[3]]),
    ],
    "include_stop_str_in_output": [1, None, "yes", 10**5000],
    "ignore_eos": [0],
    "skip_special_tokens": ["no"],
    "logprobs": [-1, 65, True, 10**5000],
    "repetition_penalty": [0, -1, math.inf],
    "presence_penalty": [2.1, -2.1],
    "frequency_penalty": [3, "1"],
    "logit_bias": [
        *([1], {"x": 1}, {-1: 1}, {1: 101}, {1: "1"}, {"9" * 5000: 1}, {1.5: 1}, {True: 1}, {"5": 1, 5: 2}),
        *(((5, 1.0), (5, 2.0)), [[5, 1]] * 2, (([1], 2.0),), [(1, 2, 3)], ["12"], np.array([[5, 1]])),
        *({10**5000: 1}, 10**5000),
    ],
    "allowed_token_ids": [[], [-1], 5, np.array(5)],
    "bad_words": [[""], "word", ["\ud800"], 10**5000, [10**5000], np.array("a")],
    "truncate_prompt_tokens": [0, -2, 1.5, 10**5000],
    "profile": ["", 3, ["tree-4"], 10**5000, [10**5000]],
    "acceptance": ["greedy", None, 3, np.array(["lossless"]), 10**5000],
}


def name_of(value: Any) -> str:
    return shown(value)[:60]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in WRONG for value in WRONG[field]], ids=name_of)
def test_wrong_values_are_refused_by_the_field_s_name(field: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=rf"{field}.*expected") as found:
        SamplingParams(**{field: value})
    assert len(str(found.value)) < 400


@pytest.mark.parametrize("field", FULL)
def test_a_number_of_thousands_of_digits_is_not_put_into_messages_whole(field: str) -> None:
    for value in (10**4000, [10**4000], {10**4000: 1}, {1: 10**4000}, [[1, 10**4000]]):
        with pytest.raises(ArgumentError, match=field) as found:
            SamplingParams(**{field: value})
        assert len(str(found.value)) < 400


def test_parameters_can_always_be_printed() -> None:
    most = 2**64 - 1
    assert str(most) in repr(SamplingParams(max_tokens=most, top_k=most, truncate_prompt_tokens=most))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", -1, "seed is -1, which vLLM reads as a random seed; expected a number from 0 up, or None"),
        ("logprobs", -1, "logprobs is -1, which vLLM reads as all tokens; expected at most 64, or None"),
        ("stop", 5, "stop is 5, of type int; expected one text, or a list of texts"),
        ("bad_words", "word", "bad_words is 'word', of type str; expected a list of texts"),
        ("stop_token_ids", 5, "stop_token_ids is 5, of type int; expected a list of token ids"),
        ("logit_bias", ((5, 1.0), (5, 2.0)), "logit_bias has the token id 5 twice; expected it once"),
        ("logit_bias", {5: 1, "5": 1}, "logit_bias has the token id 5 twice; expected it once"),
    ],
)
def test_messages_say_what_to_pass(field: str, value: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        SamplingParams(**{field: value})


def test_all_fields_are_tested_for_wrong_values() -> None:
    assert set(WRONG) == set(FULL)


@pytest.mark.parametrize(
    "more",
    [{"temperature": 0.5}, {"top_k": 3}, {"logit_bias": {1: 1}}, {"min_tokens": 3}, {"bad_words": ["a"]}],
    ids=str,
)
def test_typical_acceptance_has_no_processors(more: dict[str, Any]) -> None:
    (field,) = more
    with pytest.raises(ArgumentError, match=rf"{field} is .* with acceptance 'typical'; expected the default"):
        SamplingParams(acceptance="typical", **more)


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
def test_token_ids_are_checked_against_a_vocabulary(field: str) -> None:
    params = SamplingParams(**{field: {10: 1.0} if field == "logit_bias" else [3, 10]})
    params.check_vocabulary(11)
    with pytest.raises(ArgumentError, match=f"{field} has the token id 10; expected one from 0 to 9"):
        params.check_vocabulary(10)
