"""Evaluates heads on rows held out from training: accuracy, and the trees with the most tokens per step.

Tokens per step are exactly those of decoding the same answers (`medusa_profiles.simulation`), because the ranks of the
targets determine which drafts are accepted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from medusa_profiles.profile import ProfileError, TreeProfile
from medusa_profiles.simulation import best_decoding_tree, tokens_per_step

from medusa_exporter.distillation.dataset import Array, DataError, DataSet, group_of
from medusa_exporter.files import write_bytes
from medusa_exporter.heads.modules import MedusaHeads
from medusa_exporter.prompts import Turns
from medusa_exporter.training.accuracy import Hits, accuracies, measure_hits
from medusa_exporter.training.draft_vocabulary import most_frequent
from medusa_exporter.training.hidden_states import Positions, check_model, collect_positions

SIZES = (2, 4, 6, 8, 12, 16, 32, 64, 128)  # nodes, root included
VOCABULARIES = (2_048, 4_096, 8_192, 16_384, 32_768)
VOCABULARY_SIZES = (8, 64)  # nodes of the trees that a draft vocabulary is evaluated with


@dataclass(frozen=True)
class TreeEvaluation:
    """A tree that was fitted on one half of the answers: tokens per step on that half and on the other."""

    nodes: int
    depth: int
    fitted: float
    checked: float


@dataclass(frozen=True)
class VocabularyEvaluation:
    """A smaller draft vocabulary: how many tokens per step trees of `VOCABULARY_SIZES` nodes lose with it."""

    tokens: int
    lost: dict[int, float]


@dataclass(frozen=True)
class Report:
    """The evaluation of heads.

    Attributes:
        rows: Rows of the data set that were used.
        positions: Positions in these rows.
        greedy: Whether only greedy answers were used.
        accuracy: Accuracy per head by ranks.
        lines: Tokens per step of the best tree of each size.
        vocabularies: What smaller draft vocabularies would lose.
        trees: The best trees by number of nodes, fitted on all answers.
    """

    rows: int
    positions: int
    greedy: bool
    accuracy: dict[str, list[float]]
    lines: tuple[TreeEvaluation, ...]
    vocabularies: tuple[VocabularyEvaluation, ...]
    trees: dict[int, TreeProfile]

    def facts(self) -> dict[str, Any]:
        """Return the report for JSON, without the paths of the trees."""
        facts = asdict(self)
        del facts["trees"]
        facts["trees"] = facts.pop("lines")
        return facts


def choose_rows(data: DataSet, hold_out: float | None, opened_by: Iterable[Turns] = ()) -> tuple[DataSet, bool]:
    """Select the rows to evaluate on.

    Args:
        data: The data set.
        hold_out: The share that training held out, `None` for all rows.
        opened_by: Select only conversations that start with one of these prompts, if there are any.

    Returns:
        The rows, only greedy ones if there are any, and whether they are greedy.

    Raises:
        DataError: No row is left.
    """
    chosen = data.held_out(hold_out) if hold_out is not None else np.ones(data.rows, bool)
    if groups := [group_of(turns[0]) for turns in opened_by]:
        chosen &= np.isin(data.groups, np.array(groups, np.uint64))
    if not chosen.any():
        held_out = "" if hold_out is None else f" was held out from training (--hold-out {hold_out})"
        opened = f" begins with one of the {len(groups)} prompts" if groups else ""
        raise DataError(
            f"none of the {data.rows} conversations{' and'.join(filter(None, (held_out, opened)))}; expected at least "
            "one; use --all, more data, or all prompts"
        )
    greedy = chosen & (data.temperature == 0)
    return (data.select(greedy), True) if greedy.any() else (data.select(chosen), False)


def evaluate_heads(
    model: Any,
    heads: MedusaHeads,
    data: DataSet,
    *,
    name: str,
    source: str,
    hold_out: float | None = 0.02,
    opened_by: Iterable[Turns] = (),
) -> Report:
    """Evaluate heads on a data set.

    Args:
        model: The decoder.
        heads: Its heads.
        data: A data set that was distilled from the decoder.
        name: Name of the model.
        source: A line that says where the trees come from.
        hold_out: The share that training held out, `None` for all rows.
        opened_by: As for `choose_rows`.

    Raises:
        DataError: The data belongs to another model, or no row is left.
    """
    check_model(data, model, name)
    rows, greedy = choose_rows(data, hold_out, opened_by)
    found = collect_positions(model, rows, heads.heads, taps=heads.taps)
    hits, answers = measure_hits(heads, model, found), answers_of(found)
    first = (rows.groups[found.row.numpy()] % np.uint64(2)) == 0  # by conversation, so that the halves are independent
    known = np.maximum(hits, -1)
    lines = evaluate_trees(known, answers, first)
    trees = fit_trees(known, answers, source)
    learnt = data.select(~data.held_out(hold_out)) if hold_out else data
    evaluated = {nodes: trees[nodes] for nodes in VOCABULARY_SIZES if nodes in trees}
    vocabularies = evaluate_vocabularies(model, heads, found, learnt, evaluated, known)
    return Report(rows.rows, len(found), greedy, accuracies(hits), lines, vocabularies, trees)


def answers_of(found: Positions) -> Array:
    """Number the answers that positions belong to, (P,): places 4, 5, 6, 20, 21 give 0, 0, 0, 1, 1."""
    place = found.place.cpu().numpy()
    return np.cumsum(np.diff(place, prepend=place[:1]) != 1)


def fit_trees(hits: Hits, answers: Array, source: str) -> dict[int, TreeProfile]:
    """Fit the best tree of each size on hits (P, K); sizes with too few samples are left out."""
    trees: dict[int, TreeProfile] = {}
    for nodes in SIZES:
        try:
            trees[nodes] = best_decoding_tree(hits, answers, nodes, f"tree-{nodes}", source)
        except ProfileError:
            break
    return trees


def evaluate_trees(hits: Hits, answers: Array, first: Array) -> tuple[TreeEvaluation, ...]:
    """Fit trees on hits[first] (P, K) and check them on the other half; returns nothing if a half is empty."""
    if first.all() or not first.any():
        return ()
    halves = [(hits[half], answers[half]) for half in (first, ~first)]
    lines = []
    for nodes, tree in fit_trees(*halves[0], source="").items():
        fitted, checked = (round(tokens_per_step(tree, *half), 4) for half in halves)
        lines.append(TreeEvaluation(nodes, tree.depth, fitted, checked))
    return tuple(lines)


def evaluate_vocabularies(
    model: Any, heads: MedusaHeads, found: Positions, learnt: DataSet, trees: dict[int, TreeProfile], hits: Hits
) -> tuple[VocabularyEvaluation, ...]:
    """Evaluate smaller draft vocabularies, counted on the rows `learnt`; nothing if heads have own lm_heads."""
    if heads.own_lm_head is not None or not trees:
        return ()
    answers, fewer, lines = answers_of(found), copy.deepcopy(heads), []
    whole = {nodes: tokens_per_step(tree, hits, answers) for nodes, tree in trees.items()}
    for size in (size for size in VOCABULARIES if size < (heads.draft_vocabulary or learnt.facts.vocab_size)):
        fewer.token_map = most_frequent(learnt, size).to(found.root.device)
        limited = np.maximum(measure_hits(fewer, model, found), -1)
        lost = {
            nodes: round(whole[nodes] - tokens_per_step(tree, limited, answers), 4) for nodes, tree in trees.items()
        }
        lines.append(VocabularyEvaluation(size, lost))
    return tuple(lines)


def format_report(found: Report) -> str:
    """Format the report for a terminal."""
    kind = "greedy" if found.greedy else "all"
    text = [f"{found.rows} conversations ({kind}), {found.positions:,} positions", "head   top-1   top-5  top-10"]
    for head, shares in enumerate(zip(*found.accuracy.values(), strict=True)):
        text.append(f"{head:4}  " + "  ".join(f"{share:6.3f}" for share in shares))
    if found.lines:
        text.append("nodes  depth  tokens/step fitted  checked on the other half")
    else:
        text.append("too few conversations to fit trees on one half and to check them on the other")
    text += [f"{line.nodes:5}  {line.depth:5}  {line.fitted:18.3f}  {line.checked:7.3f}" for line in found.lines]
    for vocabulary in found.vocabularies:
        lost = ", ".join(f"{value:.3f} at {nodes} nodes" for nodes, value in vocabulary.lost.items())
        text.append(f"a draft vocabulary of {vocabulary.tokens:,} would lose {lost}")
    if missing := [str(size) for size in SIZES if size not in found.trees]:
        text.append(f"too few positions to fit trees of {', '.join(missing)} nodes")
    return "\n".join(text)


def write_profiles(trees: dict[int, TreeProfile], folder: Path) -> None:
    """Write each tree as `tree-{nodes}.toml`."""
    from medusa_profiles.toml import to_toml

    folder.mkdir(parents=True, exist_ok=True)
    for nodes, tree in trees.items():
        write_bytes(folder / f"tree-{nodes}.toml", to_toml(tree).encode())
