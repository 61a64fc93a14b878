"""What several commands' options share."""

from __future__ import annotations

from pathlib import Path

import pytest
from medusa_exporter.cli.options import choose_trees
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import BundleError


def test_trees_are_chosen_by_name_each_once(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert [tree.name for tree in choose_trees(bundle, ("tree-4", "chain-1", "tree-4"))] == ["tree-4", "chain-1"]
    assert len(choose_trees(bundle, ())) == len(bundle.manifest.profiles)
    with pytest.raises(BundleError, match="no profile 'oak'"):
        choose_trees(bundle, ("oak",))
