"""The worker of peers.py with systems that answer without a model."""

import os
import time

import peers_worker
import pytest
from peers_runners import Report


def answer(prompt: list[int], tokens: int, report: Report) -> None:
    """Repeat the prompt's last token: one by the prefill, then two in each step."""
    report(prompt[-1:])
    left = tokens - 1
    while left:
        time.sleep(0.002)
        report(prompt[-1:] * min(2, left))
        left -= min(2, left)


def test_prefill_and_steps_are_timed_separately() -> None:
    found = peers_worker.measure(answer, [1, 2, 3], 6)
    assert found["answer"] == [3] * 6
    assert (found["tokens"], found["steps"], found["prompt_tokens"]) == (5, 3, 3)
    assert found["decode_seconds"] >= 0.006 > found["prefill_seconds"]
    assert found["decode_seconds"] >= found["median_step_seconds"] >= 0.002
    assert found["cores_used"] < 0.9  # it slept


def test_an_answer_of_another_length_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="the answer has 6 tokens in 3 steps, expected 5 tokens"):
        peers_worker.measure(lambda prompt, tokens, report: answer(prompt, tokens + 1, report), [1], 5)


def test_the_least_disturbed_attempt_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = iter([0.5, 0.2, 0.4, 0.01, 0.0])
    monkeypatch.setattr(peers_worker, "measure", lambda *_: {"other_load": next(loads)})
    assert peers_worker.least_disturbed(answer, [1], 2, 3) == {"other_load": 0.2}
    assert peers_worker.least_disturbed(answer, [1], 2, 3) == {"other_load": 0.01}  # quiet: no further attempt
    assert next(loads) == 0.0


def test_requests_are_served_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers_worker.RUNNERS, "echo", (lambda job: answer, ("numpy",)))
    job = {
        "system": "echo",
        "prompts": [[1], [2]],
        "prefills": [[3, 4]],
        "max_new_tokens": 3,
        "warm_up_tokens": 2,
        "attempts": 1,
        "spawned": time.monotonic() - 5,
    }
    requests = iter([job, {"prompts": 1}, {"prefills": 0}, {"prompts": 0}, {}])
    opened, first, prefill, second, last = peers_worker.serve(requests)
    assert 5 <= opened["start_seconds"] < 6
    assert [one["answer"] for one in (first, second)] == [[2, 2, 2], [1, 1, 1]]
    assert prefill.keys() == {"prompt_tokens", "prefill_seconds"}
    assert prefill["prompt_tokens"] == 2
    assert opened["versions"].keys() == {"numpy", "python"}
    if os.path.exists("/proc/self/smaps_rollup"):  # noqa: PTH110
        assert last["peak_memory_bytes"] >= opened["memory_bytes"]["rss"] > opened["memory_bytes"]["anonymous"] > 0
