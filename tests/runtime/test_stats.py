"""Counters add up, by depth too, from several threads."""

import threading

from medusa_profiles import TreeProfile
from medusa_runtime.drafting.draft_tree import DraftTree
from medusa_runtime.stats import DepthCounts, Stats, StatsCollector


def test_nothing_has_happened_yet():
    assert StatsCollector().snapshot() == Stats()
    assert Stats().tokens_per_step == 0


def test_depths_are_counted_with_trees_of_several_depths():
    counts = DepthCounts()
    for accepted, depth in ((2, 3), (0, 0), (0, 1), (4, 4)):
        counts.add(accepted, depth)
    assert counts.accepted == [2, 2, 1, 1]
    assert counts.drafted == [3, 2, 2, 1]


def test_steps_add_up():
    collector = StatsCollector()
    collector.add_step(
        0.5,
        tokens=3,
        accepted=2,
        tree=DraftTree(TreeProfile("eight", ((0,), (0, 0), (0, 0, 0), (1,), (2,), (3,), (4,)))),
        depth=3,
    )
    collector.add_step(0.25, tokens=1, accepted=0, tree=DraftTree(TreeProfile.plain()), depth=0)
    collector.add(finished=1, prompt_tokens=7, reused_tokens=5)
    found = collector.snapshot(waiting=2, kv_rows=9)
    assert (found.steps, found.drafts, found.draft_tokens, found.accepted_tokens) == (2, 1, 7, 2)
    assert found.step_tokens == 4 and found.steps_by_draft == {"eight": 1, "plain": 1}
    assert (found.step_seconds, found.finished, found.prompt_tokens, found.waiting, found.kv_rows) == (0.75, 1, 7, 2, 9)
    assert found.accepted_by_depth == (1, 1, 0) and found.drafted_by_depth == (1, 1, 1)
    assert found.tokens_per_step == 2 and found.reused_tokens == 5
    assert collector.snapshot().waiting == 0  # not a total


def test_threads_lose_no_count():
    collector = StatsCollector()
    threads = [threading.Thread(target=lambda: [collector.add(failed=1) for _ in range(2000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert collector.snapshot().failed == 8000
