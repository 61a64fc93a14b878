"""What a loaded bundle may draft: in quantised precisions only what has exactly the tokens of plain decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
from medusa_runtime.loading import load_bundle


@pytest.mark.parametrize("precision", ["fp32", "w8a8"])
def test_in_quantised_precisions_only_chains_are_drafted(tiny_precisions: Path, precision: str) -> None:
    for profile in (None, "tree-8"):
        options = load_bundle(tiny_precisions, precision=precision, profile=profile).experience.options
        trees = list(options.profiles)
        assert options.literals and not options.joint
        assert all(tree.is_chain for tree in trees) or (precision == "fp32" and profile == "tree-8")
        assert ("tree-8" in [tree.name for tree in trees]) is (precision == "fp32" and profile == "tree-8")
