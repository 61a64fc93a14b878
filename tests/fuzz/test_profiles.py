"""Mutated trees."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import strategies as st

from . import mutations
from .child import Child
from .tally import Tally, run_cases


def test_profiles(tmp_path: Path, tallies: list[Tally]) -> None:
    """Each mutated TOML is refused, or is the tree that it says."""
    one = st.one_of(mutations.bytewise, mutations.structured, mutations.structured).map(mutations.to_json)
    cases = st.fixed_dictionaries({"index": st.integers(0, 99), "mutations": st.lists(one, min_size=1, max_size=3)})
    tally = run_cases("profiles", Child("profile_cases", tmp_path, tmp_path), cases, 2_000, 150, lambda _one: False)
    tallies.append(tally)
    assert sum(tally.counts.values()) >= 100
    assert not tally.findings, "\n".join(json.dumps(one) for one in tally.findings[:12])
    assert tally.growth < 300
