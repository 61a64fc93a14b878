"""How good heads are, and the trees that suit them, on rows kept back from training.

Every answer position counts as a step. The steps that a decoder really takes are only some of the positions (it skips
those inside an accepted path), so the tokens per step given here are an estimate; `bench` measures them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_profiles.search import best_tree, expected_tokens

from medusa_exporter.heads.accuracy import measure_hits, top_accuracy
from medusa_exporter.heads.backbone import check_model, positions
from medusa_exporter.heads.data import Array, DataError, DataSet
from medusa_exporter.heads.modules import MedusaHeads

SIZES = (2, 4, 6, 8, 12, 16, 32, 64)  # nodes, root included
ACCURACY_RANKS = (1, 5, 10)


@dataclass(frozen=True)
class TreeLine:
    """One tree: nodes with its root, tokens per step on the half it was fitted on and on the other half."""

    nodes: int
    depth: int
    fitted: float
    checked: float


@dataclass(frozen=True)
class Report:
    """Accuracy per head by ranks, the lines of the trees, and the trees themselves by nodes."""

    rows: int
    positions: int
    greedy: bool
    accuracy: dict[str, list[float]]
    lines: tuple[TreeLine, ...]
    trees: dict[int, TreeProfile]

    def facts(self) -> dict[str, Any]:
        """The report in JSON's terms, without the trees' paths."""
        return {
            "rows": self.rows,
            "positions": self.positions,
            "greedy": self.greedy,
            "accuracy": self.accuracy,
            "trees": [asdict(line) for line in self.lines],
        }


def choose_rows(data: DataSet, hold_out: float | None) -> tuple[DataSet, bool]:
    """Keep the rows held back (all with None); of these the greedy ones where there are any. Say if they are greedy.

    Raises DataError when no row is left.
    """
    chosen = data.held_back(hold_out) if hold_out is not None else np.ones(data.rows, bool)
    if not chosen.any():
        raise DataError(f"none of {data.rows} rows is held back at {hold_out}; use --all or a larger --hold-out")
    greedy = chosen & (data.temperature == 0)
    return (data.select(greedy), True) if greedy.any() else (data.select(chosen), False)


def report(
    model: Any, heads: MedusaHeads, data: DataSet, *, name: str, source: str, hold_out: float | None = 0.02
) -> Report:
    """Judge `heads` on `data`.

    name: the model's. source: a line that says where trees come from. hold_out: the share that `train` held back, None
    for all rows. Raises DataError for another model's data or when nothing is left to judge on.
    """
    check_model(data, model, name)
    rows, greedy = choose_rows(data, hold_out)
    found = positions(model, rows, heads.heads, taps=heads.taps)
    hits = measure_hits(heads, model, found)
    first = (rows.groups[found.row.numpy()] % np.uint64(2)) == 0  # by conversation, so that the halves are strangers
    lines, trees = fit_trees(np.maximum(hits, -1), first, source)
    accuracy = {f"top{ranks}": top_accuracy(hits, ranks) for ranks in ACCURACY_RANKS}
    return Report(rows.rows, len(found), greedy, accuracy, lines, trees)


def fit_trees(hits: Array, first: Array, source: str) -> tuple[tuple[TreeLine, ...], dict[int, TreeProfile]]:
    """Fit the best tree of each size on hits[first] (S, K) and check it on the others.

    Sizes for which there are too few samples are left out, and all sizes when a half is empty.
    """
    lines: list[TreeLine] = []
    trees: dict[int, TreeProfile] = {}
    if first.all() or not first.any():
        return (), {}
    for nodes in SIZES:
        try:
            tree = best_tree(hits[first], nodes, f"tree-{nodes}", source)
        except ProfileError:
            break
        fitted, checked = (round(expected_tokens(tree, half), 4) for half in (hits[first], hits[~first]))
        lines.append(TreeLine(nodes, tree.depth, fitted, checked))
        trees[nodes] = tree
    return tuple(lines), trees


def as_text(found: Report) -> str:
    """Lay the report out for a terminal."""
    kind = "greedy" if found.greedy else "all"
    text = [f"{found.rows} rows ({kind}), {found.positions:,} positions", "head   top-1   top-5  top-10"]
    for head, shares in enumerate(zip(*found.accuracy.values(), strict=True)):
        text.append(f"{head:4}  " + "  ".join(f"{share:6.3f}" for share in shares))
    text.append("nodes  depth  tokens/step fitted  checked on the other half")
    text += [f"{line.nodes:5}  {line.depth:5}  {line.fitted:18.3f}  {line.checked:7.3f}" for line in found.lines]
    if len(found.lines) < len(SIZES):
        missing = [size for size in SIZES if size not in found.trees]
        text.append(f"too few samples to fit {', '.join(map(str, missing))} nodes")
    return "\n".join(text)


def write_profiles(trees: dict[int, TreeProfile], folder: Path) -> None:
    """Write each tree as `tree-{nodes}.toml`."""
    from medusa_profiles.toml import to_toml

    folder.mkdir(parents=True, exist_ok=True)
    for nodes, tree in trees.items():
        (folder / f"tree-{nodes}.toml").write_text(to_toml(tree), encoding="utf-8")
