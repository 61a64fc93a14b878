"""Acceptance from another model's recording: what a tree's steps would cost if the heads guessed as well as there.

Heads of random weights never agree with their decoder, so a model of a real size without trained heads shows what its
steps take but not how many there are. A recording supplies that. Its tokens mean nothing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_profiles.profile import TreeProfile
from medusa_runtime.accept import Acceptance, LogitsReader, greedy
from medusa_runtime.errors import MedusaError
from medusa_runtime.facts import PLAIN

REMEDY = "record them first: medusa-export bench BUNDLE --profile … --json FILE, with a bundle whose heads are trained"


@dataclass(frozen=True)
class RecordedAcceptance:
    """How many tokens each step of each tree added, answer by answer, in a run with trained heads.

    kept: by profile, one list for each answer, its last step left out (what it kept was cut by the answer's end).
    """

    source: str
    model: str
    kept: dict[str, tuple[tuple[int, ...], ...]]

    @classmethod
    def read(cls, file: Path, trees: Iterable[TreeProfile]) -> RecordedAcceptance:
        """Read what `medusa-export bench --json` wrote. Raises MedusaError where it lacks one of the trees."""
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            results, model, accept = content["results"], content["bundle"]["model"], content["settings"]["accept"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise MedusaError(f"{file} is no JSON that medusa-export bench wrote ({error!r}); {REMEDY}") from None
        if accept != "greedy":
            raise MedusaError(f"{file} was not recorded but {accept} itself, expected greedy; {REMEDY}")
        return cls(file.name, str(model), {tree.name: _kept(file, results, tree) for tree in trees})

    def rule(self, profile: str, number: int) -> ForcedAcceptance:
        """The rule for one answer: it begins with the recording's answer of that number, counted round and round."""
        answers = self.kept[profile]
        begin = number % len(answers)
        return ForcedAcceptance([*itertools.chain(*answers[begin:], *answers[:begin])])


class ForcedAcceptance:
    """Keeps what it is told to (`medusa_runtime.accept.AcceptRule`), for one answer: LOSSY, for measuring only."""

    def __init__(self, kept: Sequence[int]) -> None:
        """kept: how many tokens each step adds; begun again at the end."""
        self._kept = itertools.cycle(kept)
        self._paths: dict[int, list[int]] = {}  # by how many nodes are kept

    def __call__(
        self, tree: TreeProfile, tokens: Sequence[int], argmax: Sequence[int], _logits: LogitsReader, /
    ) -> Acceptance:
        """Keep the first node of the depth that the step is to reach, and its ancestors."""
        if tree.size == 1:  # no room was left for the tree
            return greedy(tree, tokens, argmax)
        kept = next(self._kept)
        if kept not in self._paths:
            node = tree.depths.tolist().index(kept - 1)
            self._paths[kept] = tree.mask[node].nonzero()[0].tolist()  # the node's ancestors and itself, ascending
        path = self._paths[kept]
        return path, argmax[path[-1]]


def _kept(file: Path, results: Any, tree: TreeProfile) -> tuple[tuple[int, ...], ...]:
    """One tree's lists from the first backend that has it."""
    try:
        found = [result for result in results if result["profile"] == tree.name]
        if not found:
            named = sorted({str(result["profile"]) for result in results} - {PLAIN})
            raise MedusaError(f"{file} has no profile {tree.name!r}, it has {', '.join(named) or 'none'}; {REMEDY}")
        answers = [
            tuple(answer[:-1]) for one in found if one["backend"] == found[0]["backend"] for answer in one["accepted"]
        ]
        sizes = {result["nodes"] for result in found}
        sound = all(type(count) is int and 1 <= count <= tree.depth + 1 for answer in answers for count in answer)
    except (KeyError, TypeError) as error:
        raise MedusaError(f"{file} does not say what its steps accepted ({error!r}); {REMEDY}") from None
    if sizes != {tree.size} or not sound:
        raise MedusaError(
            f"{file} tells of another tree named {tree.name!r} than this bundle's of {tree.size} nodes, "
            f"{tree.depth} deep; {REMEDY}"
        )
    if not any(answers):
        raise MedusaError(f"{file} holds no whole step of {tree.name!r}; record longer answers")
    return tuple(answer for answer in answers if answer)
