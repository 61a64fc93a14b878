"""Arguments of other types are refused with an error that says what was expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from medusa_runtime.accept import greedy
from medusa_runtime.arguments import as_bool, as_optional_int, as_path, as_stop_ids, as_text, as_token_ids
from medusa_runtime.bundle import Bundle
from medusa_runtime.decoder import Decoder
from medusa_runtime.engine import Engine
from medusa_runtime.errors import ArgumentError, PromptError

from .decoding import CHAIN
from .fake_backend import FakeBackend


@pytest.mark.parametrize(
    "prompt",
    [
        [1.0, 2],
        [1.7],
        np.array([1.0, 2.0]),
        np.array([True, False]),
        [True, 2],
        [np.bool_(True)],
        ["1", "2"],
        np.array(["1"]),
        "12",
        b"12",
        [[1, 2], [3]],
        [[1, 2], [3, 4]],
        np.array([[1, 2]]),
        np.array(3),
        [None],
        None,
        7,
        {1, 2},
        {1: 2},
        [1j],
        (token for token in (1, 2)),
    ],
    ids=lambda prompt: f"{type(prompt).__name__} {prompt!r:.20}",
)
def test_a_prompt_that_is_no_list_of_ids_is_refused(prompt: Any) -> None:
    decoder = Decoder(FakeBackend(), CHAIN)
    with pytest.raises(PromptError, match="one flat list of token ids"):
        decoder.start(prompt)
    assert decoder.backend.steps == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("prompt", [[], (), np.array([]), np.zeros(0, np.int64)], ids=repr)
def test_an_empty_prompt_is_called_empty(prompt: Any) -> None:
    with pytest.raises(PromptError, match="the prompt is empty"):
        as_token_ids(prompt, 32)


@pytest.mark.parametrize("prompt", [[1 << 70], [-(1 << 70)], np.array([1 << 63], np.uint64), [-1], [32]], ids=repr)
def test_ids_outside_the_vocabulary_are_refused_however_far(prompt: Any) -> None:
    with pytest.raises(PromptError, match="token ids outside 0 … 31"):
        as_token_ids(prompt, 32)


@pytest.mark.parametrize(
    "prompt",
    [
        [4, 5],
        (4, 5),
        range(4, 6),
        [np.int32(4), np.uint8(5)],
        *(np.array([4, 5], kind) for kind in (np.int8, np.uint8, np.int32, np.uint64, ">i4")),
        np.array([4, 9, 5])[::2],
    ],
    ids=repr,
)
def test_whole_numbers_of_any_kind_are_ids(prompt: Any) -> None:
    found = as_token_ids(prompt, 32)
    assert (found.tolist(), found.dtype) == ([4, 5], np.int64)


@pytest.mark.parametrize("value", ["20", 2.0, None, True, [2], 0, -1, np.float32(2)], ids=repr)
def test_max_new_tokens_is_a_whole_number_of_at_least_one(value: Any) -> None:
    decoder = Decoder(FakeBackend(), CHAIN)
    with pytest.raises(PromptError, match=r"max_new_tokens is .*expected (a whole number|at least 1)"):
        decoder.start([1], value)
    assert decoder.start([1], np.int64(2))


@pytest.mark.parametrize("value", ["</s>", 5, ["</s>"], [2.0], [True], [None], np.array(5), {5: 6}], ids=repr)
def test_stop_ids_are_a_collection_of_whole_numbers(value: Any) -> None:
    with pytest.raises(PromptError, match="stop_ids"):
        Decoder(FakeBackend(), CHAIN).start([1], 5, value)


def test_numbers_of_thousands_of_digits_are_refused_in_words() -> None:
    for digits in (4000, 5000):
        huge = 10**digits
        for prompt in ([huge], [-huge], [1, huge], [[huge]], {huge}):
            with pytest.raises(PromptError, match=r"one flat list of token ids|token ids outside") as found:
                as_token_ids(prompt, 32)
            assert len(str(found.value)) < 400
        for call in (as_bool, as_text, as_path, lambda what, value: as_optional_int(what, value, 1)):
            for value in (huge, -huge, [huge]):
                with pytest.raises(ArgumentError, match=r"it is .*expected") as refused:
                    call("it", value)
                assert len(str(refused.value)) < 400
        with pytest.raises(PromptError, match="stop_ids is"):
            as_stop_ids(huge)


@pytest.mark.parametrize("profile", ["tree-8", 8, ((0,),), {"name": "x"}], ids=repr)
def test_a_profile_is_a_tree_profile(profile: Any) -> None:
    with pytest.raises(ArgumentError, match="expected a TreeProfile"):
        Decoder(FakeBackend(), profile)
    decoder = Decoder(FakeBackend(), CHAIN)
    for value in (profile, None):
        with pytest.raises(ArgumentError, match="expected a TreeProfile"):
            decoder.set_profile(value)
    assert decoder.profile is CHAIN


def test_a_rule_is_a_function() -> None:
    wrong: Any = "greedy"
    with pytest.raises(ArgumentError, match="the accept rule is 'greedy'; expected a function"):
        Decoder(FakeBackend(), CHAIN, wrong)
    assert Decoder(FakeBackend(), CHAIN, greedy).accept is greedy


@pytest.mark.parametrize("value", [0, -3, 1.0, "2", True, [1]], ids=repr)
def test_numbers_that_may_be_left_out(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"threads is .*expected (a whole number|at least 1)"):
        as_optional_int("threads", value, 1)
    assert as_optional_int("threads", None, 1) is None


@pytest.mark.parametrize("value", [None, 123, b"bundle", "", ["bundle"]], ids=repr)
def test_a_bundle_is_named_by_a_path_of_text(value: Any) -> None:
    for load in (Engine.load, Bundle.open):
        with pytest.raises(ArgumentError, match=r"the bundle is .*expected a path: pass a str"):
            load(value)


@pytest.mark.parametrize("value", [123, b"0" * 64, Path("0" * 64)], ids=repr)
def test_a_digest_is_a_text(value: Any, tmp_path: Path) -> None:
    for load in (Engine.load, Bundle.open):
        with pytest.raises(ArgumentError, match=r"expected_digest is .*pass a str"):
            load(tmp_path, expected_digest=value)
