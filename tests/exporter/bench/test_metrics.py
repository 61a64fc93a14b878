"""The arithmetic from measurements to metrics."""

from __future__ import annotations

import json

import pytest
from medusa_exporter.answer_differences import AnswerDifference
from medusa_exporter.bench.metrics import METRICS, aggregate, by_category
from medusa_exporter.bench.timing import Measurement, Question, TimedAnswer
from medusa_profiles.profile import TreeProfile

from .factories import CHAIN, run, turn


def test_metrics_are_ratios_of_sums() -> None:
    turns = [
        turn(run(11, 10, 1.0), run(11, 5, 0.6, 0.1)),
        turn(run(31, 30, 3.0), run(31, 10, 1.2, 0.2), number=2),
        turn(run(3, 2, 0.4), run(3, 2, 0.6, 0.1), prompt=2),
    ]
    result = aggregate(turns, CHAIN)
    assert (result["profile"], result["nodes"], result["turns"]) == ("chain-2", 3, 3)
    assert result["tokens_per_step"] == pytest.approx(42 / 17)
    assert result["plain_step_ms"] == pytest.approx(4400 / 42)
    assert result["medusa_step_ms"] == pytest.approx(2400 / 17)
    assert result["overhead"] == pytest.approx(result["medusa_step_ms"] / result["plain_step_ms"])
    assert result["speedup"] == pytest.approx(4.4 / 2.4)
    assert result["speedup"] == pytest.approx(result["tokens_per_step"] / result["overhead"])
    assert result["host_us_per_step"] == pytest.approx(0.4e6 / 17)
    assert result["tokens_per_second"] == pytest.approx(42 / 2.4)
    assert result["tpot_ms"] == pytest.approx(2400 / 42)
    assert result["identical"] is True
    assert (result["divergences"], result["max_logit_gap"], result["mismatches"], result["differences"]) == (
        0,
        0.0,
        0,
        [],
    )


def test_plain_decoding_is_a_profile_too() -> None:
    result = aggregate([turn(run(11, 10, 1.0), run(11, 5, 0.6))], TreeProfile.plain())
    assert (result["profile"], result["nodes"], result["steps"]) == ("plain", 1, 10)
    assert result["tokens_per_step"] == result["overhead"] == result["speedup"] == 1.0
    assert result["tokens_per_second"] == pytest.approx(10.0)


def test_steps_and_first_tokens_have_percentiles() -> None:
    steps = tuple(number / 1e3 for number in range(1, 101))
    one = TimedAnswer(tuple(range(101)), (1,) * 100, 0.010, steps, 0.0)
    other = TimedAnswer((0,), (), 0.030, (), 0.0)
    turns = [turn(one, one), turn(other, other, prompt=2)]
    result = aggregate(turns, CHAIN)
    assert result["step_ms"] == pytest.approx({"mean": 50.5, "p10": 10.9, "p50": 50.5, "p90": 90.1, "p99": 99.01})
    assert result["ttft_ms"] == pytest.approx({"p50": 20.0, "p90": 28.0})
    slowest = result["slowest_steps"]
    assert [(one["prompt"], one["turn"], one["step"]) for one in slowest] == [
        (1, 1, step) for step in range(100, 90, -1)
    ]
    assert slowest[0]["ms"] == pytest.approx(100.0)


def test_past_length_is_the_mean_over_steps() -> None:
    medusa = TimedAnswer((7, 8, 9, 10, 11, 12), (3, 1, 1), 0.0, (0.1,) * 3, 0.0)
    result = aggregate([turn(run(6, 5, 1.0), medusa, ids=range(100))], CHAIN)
    assert result["mean_past_length"] == pytest.approx((100 + 103 + 104) / 3)
    assert result["tokens_added_by_steps"] == [[3, 1, 1]]
    both = aggregate([turn(run(6, 5, 1.0), medusa, ids=range(100))], TreeProfile.plain())
    assert both["mean_past_length"] == pytest.approx(100 + 2)


def test_percentiles_are_over_prompts_not_turns() -> None:
    turns = [
        turn(run(11, 10, 1.0), run(11, 10, 1.0), prompt=1),
        turn(run(11, 10, 1.0), run(11, 5, 1.0), prompt=1, number=2),
        turn(run(11, 10, 1.0), run(11, 5, 1.0), prompt=2),
        turn(run(11, 10, 1.0), run(11, 2, 1.0), prompt=3),
    ]
    spread = aggregate(turns, CHAIN)["percentiles_over_prompts"]
    assert set(spread) == set(METRICS)
    assert spread["tokens_per_step"]["p50"] == pytest.approx(2.0)  # of 20/15, 10/5, 10/2
    assert all(values["p10"] <= values["p50"] <= values["p90"] for values in spread.values())
    assert all(list(values) == ["p10", "p50", "p90"] for values in spread.values())


def test_each_category_has_metrics() -> None:
    turns = [
        turn(run(11, 10, 1.0), run(11, 5, 0.75), prompt=1),
        turn(run(11, 10, 1.0), run(11, 2, 0.25), prompt=2),
        turn(run(11, 10, 1.0), run(11, 3, 0.25), prompt=2, number=2),
        turn(run(11, 10, 1.0), run(11, 1, 0.25), prompt=3),
    ]
    found = by_category(turns, CHAIN, ["maths", "code", None])
    assert list(found) == ["maths", "code"]
    assert [found[name]["tokens_per_step"] for name in found] == [2.0, 4.0]
    assert [found[name]["prompts"] for name in found] == [1, 1]
    assert found["code"]["speedup"] == pytest.approx(4.0)


def test_a_different_answer_counts_but_not_for_the_speedup() -> None:
    turns = [
        turn(run(11, 10, 1.0), run(11, 5, 0.5)),
        turn(run(11, 10, 1.0), run(11, 5, 9.0, first=1), prompt=2, difference=AnswerDifference(3, 7, 8, 2e-4)),
        turn(run(11, 10, 1.0), run(11, 5, 9.0, first=1), prompt=3, difference=AnswerDifference(0, 7, 8, 0.5)),
        turn(run(11, 10, 1.0), run(10, 5, 9.0), prompt=4, difference=AnswerDifference(10, 7, None, None)),
    ]
    result = aggregate(turns, CHAIN)
    assert result["speedup"] == pytest.approx(2.0)
    assert result["identical"] is False
    assert (result["divergences"], result["mismatches"], result["max_logit_gap"]) == (3, 2, 0.5)
    assert result["differences"][0] == {
        "prompt": 2, "turn": 1, "position": 3, "expected": 7, "got": 8, "gap": 2e-4, "share": None,
        "exact": True,
    }  # fmt: skip
    assert aggregate(turns[3:], CHAIN)["max_logit_gap"] is None


def test_answers_of_fixed_length_all_count_for_the_speedup() -> None:
    turns = [turn(run(11, 10, 1.0), run(11, 5, 0.25)), turn(run(11, 10, 1.0), run(11, 5, 0.75, first=1), prompt=2)]
    assert aggregate(turns, CHAIN, stop_at_eos=False)["speedup"] == pytest.approx(2.0)
    assert aggregate(turns, CHAIN)["speedup"] == pytest.approx(4.0)


def test_answers_of_one_token_do_not_change_the_metrics() -> None:
    nothing = turn(run(1, 0, 0.0), run(1, 0, 0.0), prompt=2)
    alone = aggregate([nothing], CHAIN)
    assert all(
        alone[name] is None and set(alone["percentiles_over_prompts"][name].values()) == {None} for name in METRICS
    )
    assert alone["tpot_ms"] is alone["mean_past_length"] is alone["step_ms"]["p50"] is None
    whole = turn(run(11, 10, 1.0), run(11, 5, 0.5))
    both, without = (aggregate(turns, CHAIN) for turns in ([whole, nothing], [whole]))
    for result in (both, without):
        del result["turns"], result["tokens_added_by_steps"]
    assert both == without
    json.dumps(both, allow_nan=False)
    assert isinstance(nothing, Measurement) and isinstance(nothing.question, Question)
