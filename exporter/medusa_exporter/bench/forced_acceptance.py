"""Forces the number of tokens that each step accepts, as recorded in a run of another model (`bench --forced`).

A model of realistic size without trained heads can show how long its steps take. It cannot show how many steps it
takes, since random heads never agree with their decoder. A recording from a model with trained heads supplies that
number. The generated text has no meaning.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_profiles.profile import TreeProfile
from medusa_runtime.accept import Acceptance, TokenTree, greedy
from medusa_runtime.errors import MedusaError
from medusa_runtime.facts import PLAIN
from medusa_runtime.rows import RowReader

from medusa_exporter.bench.schema import SCHEMA

REMEDY = (
    "record it with: medusa-export bench BUNDLE --profile … --json FILE, using a bundle of this version with trained "
    "heads"
)


@dataclass(frozen=True)
class RecordedAcceptance:
    """How many tokens each step of each tree added in a run with trained heads.

    Attributes:
        source: Name of the file.
        model: Name of the model that was run.
        kept: For each profile a tuple for each answer, without the answer's last step, which the end of the answer may
            have cut short.
    """

    source: str
    model: str
    kept: dict[str, tuple[tuple[int, ...], ...]]

    @classmethod
    def read(cls, file: Path, trees: Iterable[TreeProfile]) -> RecordedAcceptance:
        """Read a file that `medusa-export bench --json` wrote.

        Raises:
            MedusaError: The file is something else, or has no results of one of the trees.
        """
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            schema, results, settings = content.get("schema"), content["results"], content["settings"]
            accept, model = settings["accept"], content["bundle"]["model"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise MedusaError(f"{file} is not a JSON file of medusa-export bench ({error!r}); {REMEDY}") from None
        if schema != SCHEMA:
            raise MedusaError(f"{file} has schema {schema!r:.40}, expected {SCHEMA}; {REMEDY}")
        if accept != "greedy":
            raise MedusaError(f"{file} has the acceptance rule {accept!r:.40}, expected 'greedy'; {REMEDY}")
        return cls(file.name, str(model), {tree.name: _read_kept(file, results, tree) for tree in trees})

    def rule(self, profile: str, number: int) -> ForcedAcceptance:
        """Return the acceptance rule for one answer.

        The rule starts at the recorded answer of that number, modulo their count, and continues with the next ones. Of
        the three recorded answers (3, 1), (2,) and (1, 4), number 4 gives 2, 1, 4, 3, 1, 2, 1, 4, …
        """
        answers = self.kept[profile]
        begin = number % len(answers)
        return ForcedAcceptance([*itertools.chain(*answers[begin:], *answers[:begin])])


class ForcedAcceptance:
    """An acceptance rule for one answer that keeps recorded numbers of tokens. LOSSY: only for timing."""

    def __init__(self, kept: Sequence[int]) -> None:
        """Keep `kept[0]` tokens in the first step, `kept[1]` in the second and so on; the sequence repeats."""
        self._kept = itertools.cycle(kept)
        self._paths: dict[int, list[int]] = {}  # by the number of nodes that are kept

    def __call__(
        self, tree: TokenTree, tokens: Sequence[int], argmax: Sequence[int], _logits: RowReader, /
    ) -> Acceptance:
        """Keep the recorded number of tokens: the first node at the corresponding depth, and its ancestors."""
        if tree.size == 1:  # the context had no room for the tree
            return greedy(tree, tokens, argmax)
        kept = next(self._kept)
        if kept not in self._paths:
            node = tree.depths.tolist().index(kept - 1)
            self._paths[kept] = tree.mask[node].nonzero()[0].tolist()  # ancestors and the node itself, ascending
        path = self._paths[kept]
        return path, argmax[path[-1]]


def _read_kept(file: Path, results: Any, tree: TreeProfile) -> tuple[tuple[int, ...], ...]:
    """Read the answers of one tree, from the first backend that has it."""
    try:
        found = [result for result in results if result["profile"] == tree.name]
        if not found:
            named = sorted({str(result["profile"]) for result in results} - {PLAIN})
            raise MedusaError(f"{file} has no profile {tree.name!r}, it has {', '.join(named) or 'none'}; {REMEDY}")
        answers = [
            tuple(answer[:-1])
            for one in found
            if one["backend"] == found[0]["backend"]
            for answer in one["tokens_added_by_steps"]
        ]
        sizes = {result["nodes"] for result in found}
        valid = all(type(count) is int and 1 <= count <= tree.depth + 1 for answer in answers for count in answer)
    except (KeyError, TypeError) as error:
        raise MedusaError(f"{file} lacks the tokens that its steps added ({error!r}); {REMEDY}") from None
    if sizes != {tree.size} or not valid:
        raise MedusaError(
            f"{file} has another tree under the name {tree.name!r}, expected this bundle's tree of {tree.size} nodes "
            f"and depth {tree.depth}; {REMEDY}"
        )
    if not any(answers):
        raise MedusaError(f"{file} has no complete step of {tree.name!r}, expected at least one; record longer answers")
    return tuple(answer for answer in answers if answer)
