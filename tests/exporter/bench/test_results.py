"""The results in the JSON: one for each backend and profile, and the comparisons between them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from medusa_exporter.bench.results import Case, backend_facts, case_results
from medusa_exporter.bench.worker import LoadedBackend
from medusa_runtime.backends.base import BackendFacts

from .factories import CHAIN, run, turn

FACTS = BackendFacts(
    "H100", "580", "9.0", "tensorrt", "10.1", weight_bytes=200_000_000, kv_bytes_per_token=1000, bandwidth=2e12
)
OPENED = {"a": LoadedBackend(FACTS, "fp16", 512), "b": LoadedBackend(replace(FACTS, bandwidth=None), "fp32", 512)}
CASE = Case(2, 64)


def test_a_result_for_each_backend_and_profile() -> None:
    slow = turn(run(11, 10, 2.0), run(11, 5, 0.5))
    fast = turn(run(11, 10, 1.0), run(11, 5, 0.75, first=1))
    found = case_results(CASE, [{"a": slow, "b": fast}], OPENED, [CHAIN], [None], stop_at_eos=False)
    assert [(one["backend"], one["profile"], one["precision"]) for one in found] == [
        ("a", "plain", "fp16"), ("a", "chain-2", "fp16"), ("b", "plain", "fp32"), ("b", "chain-2", "fp32"),
    ]  # fmt: skip
    assert all((one["prompt_length"], one["max_new_tokens"]) == (2, 64) for one in found)
    assert {one["best_plain"] for one in found} == {"b"}
    assert [one["speedup"] for one in found] == pytest.approx([1.0, 4.0, 1.0, 4 / 3])
    assert [one["speedup_over_best_plain"] for one in found] == pytest.approx([0.5, 2.0, 1.0, 4 / 3])
    assert [one["same_as_first_backend"] for one in found] == [
        None, None, {"answers": 1, "identical": 1}, {"answers": 1, "identical": 0},
    ]  # fmt: skip
    kv = found[0]["mean_past_length"]
    assert found[0]["memory_bound_ms"] == pytest.approx(1e3 * (200_000_000 + 1000 * kv) / 2e12)
    assert found[2]["memory_bound_ms"] is None
    json.dumps(found, allow_nan=False)


def test_a_backend_that_failed_is_compared_on_what_it_answered() -> None:
    whole = [turn(run(11, 10, 1.0), run(11, 5, 0.5), prompt=number) for number in (1, 2)]
    found = case_results(
        CASE, [{"a": whole[0], "b": whole[0]}, {"b": whole[1]}], OPENED, [CHAIN], [None, None], stop_at_eos=True
    )
    assert [(one["backend"], one["turns"]) for one in found] == [("a", 1), ("a", 1), ("b", 2), ("b", 2)]
    assert found[2]["same_as_first_backend"] == {"answers": 1, "identical": 1}
    alone = case_results(CASE, [{"b": whole[1]}], OPENED, [CHAIN], [None, None], stop_at_eos=True)
    assert [one["backend"] for one in alone] == ["b", "b"]
    assert case_results(CASE, [], OPENED, [CHAIN], [], stop_at_eos=True) == []


def test_backends_are_described() -> None:
    facts = backend_facts(OPENED["a"])
    assert (facts["device"], facts["library"], facts["precision"], facts["context"]) == (
        "H100",
        "tensorrt",
        "fp16",
        512,
    )
    assert (facts["gap_tolerance"], facts["gap_share_tolerance"]) == (None, 0.01)
    assert CASE.describe() == "prompts of 2 tokens, 64 new tokens"
    assert Case(None, 8).describe() == "prompts as they are, 8 new tokens"
