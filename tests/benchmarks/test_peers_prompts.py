"""Prompts of given lengths to prefill."""

from peers_prompts import prefill_prompts


def test_prefills_have_the_lengths_and_share_no_prefix() -> None:
    found = prefill_prompts([[1, 2, 3], [1, 4, 5, 6]], [4, 40])
    assert [len(one) for one in found] == [4] * 2 + [40] * 2
    assert len({one[0] for one in found}) == 4
    assert set(found[-1]) == {1, 2, 3, 4, 5, 6}
