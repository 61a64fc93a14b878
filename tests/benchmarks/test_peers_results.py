"""Results of peers.py: pairs stay together, intervals cover prompts and rounds, pieces of a run fit together."""

import json
from pathlib import Path

import numpy as np
import pytest
from peers_results import Results, ResultsError, agreement, bootstrap_ratio, token_rate

from .factories import facts, report, results


def test_a_constant_ratio_has_no_interval() -> None:
    below = np.random.default_rng(1).uniform(1, 9, (3, 12))
    found = bootstrap_ratio(2 * below, below)
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))


def test_the_interval_covers_prompts_and_rounds() -> None:
    even = np.ones((4, 8))
    by_prompt, by_round = even.copy(), even.copy()
    by_prompt[:, ::2], by_round[::2] = 3, 3
    for uneven in (by_prompt, by_round):
        found = bootstrap_ratio(uneven, even)
        assert found.value == 2
        assert found.low < 1.7 and found.high > 2.3
    one_round = bootstrap_ratio(by_round[:1], even[:1])
    assert (one_round.low, one_round.high) == (3, 3)


def test_the_interval_of_a_mean_is_the_textbooks() -> None:
    above = np.random.default_rng(2).normal(10, 1, (1, 400))
    found = bootstrap_ratio(above, np.ones((1, 400)))
    half = 1.96 * above.std() / np.sqrt(400)
    assert found.low == pytest.approx(found.value - half, abs=half / 5)
    assert found.high == pytest.approx(found.value + half, abs=half / 5)


def test_other_prompts_are_not_compared() -> None:
    with pytest.raises(ValueError, match=r"shapes \(1, 2\) and \(1, 3\)"):
        bootstrap_ratio(np.ones((1, 2)), np.ones((1, 3)))


def test_agreement_ends_at_the_references_end_token() -> None:
    found = agreement([[1, 2, 9, 4], [1, 3, 3, 3]], [[1, 2, 9, 5], [1, 2, 2, 2]], frozenset({9}))
    assert (found.answers, found.equal, found.tokens, found.leading) == (2, 1, 6, 3)


def test_ratios_use_the_rounds_that_both_have() -> None:
    found = results((facts("a"), [report(1.0), report(1.0)]), (facts("b"), [report(2.0)]))
    ratio = found.ratio("a", "b")
    assert ratio is not None and ratio.value == 2  # a takes half the time
    found.reports["b"] = {7: report(2.0)}
    assert found.ratio("a", "b") is None


def test_ratios_leave_out_what_was_not_measured_together() -> None:
    """One was measured alone, at half the machine's speed, and the other was added later."""
    alone = [{"together": "1"} | report(2.0)]
    found = results((facts("a"), alone), (facts("b"), [{"together": "2"} | report(1.0)]))
    assert found.ratio("b", "a") is None


def test_answers_of_every_round_are_compared() -> None:
    rounds = [report(1.0, answer=(5, 6, 9, 8)), report(1.0)]
    found = results((facts("a"), [report(1.0)]), (facts("a tree", plain="a"), rounds))
    agreed = found.equal_answers("a tree", "a", frozenset())
    assert agreed is not None
    assert (agreed.equal, agreed.leading) == (0, 2)


def test_the_fastest_is_of_the_class_and_kind() -> None:
    found = results(
        (facts("plain", own=True), [report(3.0)]),
        (facts("other build", own=True), [report(2.0)]),
        (facts("tree", own=True, plain="plain"), [report(1.0)]),
        (facts("peer"), [report(0.5)]),
        (facts("4-bit peer", "4 bit"), [report(0.1)]),
    )
    assert found.fastest(precision_class="fp32", own=True, speculates=False) == "other build"
    assert found.fastest(precision_class="fp32", own=True, speculates=True) == "tree"
    assert found.fastest(precision_class="fp32", own=False, speculates=None) == "peer"
    assert found.fastest(precision_class="8 bit", own=False, speculates=None) is None
    assert found.per_round("peer", token_rate) == [6.0]


def test_a_run_continues_where_the_earlier_one_ended(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    found = results((facts("a"), [report(1.0)]))
    found.save(file)
    again = Results.load(file, found.conditions)
    assert again.has(facts("a"), 0)
    assert not again.has(facts("a"), 1)
    assert not again.has(facts("b"), 0)
    again.add(facts("b"), 0, report(2.0))
    again.save(file)
    assert Results.load(file, found.conditions).ratio("a", "b") == found_ratio(again)
    assert json.loads(file.read_bytes())["made_by"] == "benchmarks/peers.py"


def found_ratio(of: Results) -> object:
    return of.ratio("a", "b")


def test_results_of_other_conditions_or_builds_are_not_mixed(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    found = results((facts("a"), [report(1.0)]))
    found.save(file)
    with pytest.raises(ResultsError, match=r"another settings \(threads\); give another --json"):
        Results.load(file, found.conditions | {"settings": {"threads": 1}})
    with pytest.raises(ResultsError, match=r"'a' that was another build"):
        found.has(facts("a", identity="2"), 1)
    file.write_text('{"precisions": {}}')
    with pytest.raises(ResultsError, match="earlier version"):
        Results.load(file, found.conditions)


def test_no_file_is_no_results(tmp_path: Path) -> None:
    assert Results.load(tmp_path / "new.json", {"machine": {}, "settings": {}}).contenders == {}
