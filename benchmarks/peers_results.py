"""The measurements of peers.py: kept in a JSON file, piece by piece, and compared with bootstrap intervals."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from medusa_exporter.files import write_json
from medusa_exporter.overwrite_check import JsonKind
from numpy.typing import NDArray

OUTPUT = JsonKind("benchmarks/peers.py", frozenset({"machine", "settings", "precisions"}))
DRAWS = 5000  # resamples of a bootstrap interval
COVERAGE = 0.95

Report = dict[str, Any]  # what a worker printed
Facts = Mapping[str, Any]  # what a Contender's `facts` returned, and the size of its model


class ResultsError(Exception):
    """The file has results of something else. The message says what to do."""


@dataclass(frozen=True)
class Interval:
    """A ratio and the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float


class Results:
    """All measurements so far: for each contender its facts, and a worker's report for each round.

    Attributes:
        conditions: Machine and settings, the same for all measurements.
        contenders: Facts of each contender, by name.
        reports: For each contender the reports, by round.
    """

    def __init__(self, conditions: dict[str, Any]) -> None:
        """Start without measurements."""
        self.conditions = conditions
        self.contenders: dict[str, dict[str, Any]] = {}
        self.reports: dict[str, dict[int, Report]] = {}

    @classmethod
    def load(cls, file: Path, conditions: dict[str, Any]) -> Results:
        """Read the results of earlier runs under the same conditions; none if the file does not exist or is empty.

        Raises:
            ResultsError: The file has no results of this form, or was measured under other conditions.
        """
        results = cls(conditions)
        if not file.is_file() or not file.stat().st_size:
            return results
        stored = json.loads(file.read_bytes())
        if "runs" not in stored:
            raise ResultsError(f"{file} has results of an earlier version, without runs; give another --json")
        for name, wanted in conditions.items():
            if stored[name] != wanted:
                other = [key for key in wanted if stored[name].get(key) != wanted[key]] or list(stored[name])
                raise ResultsError(
                    f"{file} was measured with another {name} ({', '.join(other)}); give another --json, or the "
                    "options of the earlier run"
                )
        for facts in stored["contenders"]:
            results.contenders[facts["name"]] = facts
        for run in stored["runs"]:
            results.reports.setdefault(run["contender"], {})[run["round"]] = run["report"]
        return results

    def has(self, facts: Facts, number: int) -> bool:
        """Return whether a contender has been measured in a round.

        Raises:
            ResultsError: Something else has been measured under its name.
        """
        known = self.contenders.get(facts["name"])
        if known and any(known[name] != facts[name] for name in ("identity", "model_bytes")):
            raise ResultsError(
                f"the results have a {facts['name']!r} that was another build (a changed bundle, tree or setting); "
                "give another --json"
            )
        return number in self.reports.get(facts["name"], {})

    def add(self, facts: Facts, number: int, report: Report) -> None:
        """Add the report of one contender in one round."""
        self.contenders[facts["name"]] = dict(facts)
        self.reports.setdefault(facts["name"], {})[number] = report

    def save(self, file: Path) -> None:
        """Write everything; the JSON has the token ids of the answers, but no text."""
        runs = [
            {"contender": name, "round": number, "report": report}
            for name, rounds in self.reports.items()
            for number, report in sorted(rounds.items())
        ]
        content = {**self.conditions, "contenders": list(self.contenders.values()), "runs": runs}
        write_json(file, OUTPUT.marked(content))

    def per_round(self, name: str, metric: Callable[[Report], float]) -> list[float]:
        """Return one metric of a contender for each of its rounds."""
        return [metric(report) for _, report in sorted(self.reports[name].items())]

    def ratio(self, ours: str, theirs: str) -> Interval | None:
        """Compare the tokens per second of two contenders in rounds that were measured together; None without any."""
        mine, other = self.reports[ours], self.reports[theirs]
        shared = sorted(mine.keys() & other.keys())
        rounds = [number for number in shared if mine[number].get("together") == other[number].get("together")]
        if not rounds:
            return None
        seconds_of = (
            np.array([[seconds(prompt) for prompt in self.reports[name][number]["prompts"]] for number in rounds])
            for name in (ours, theirs)
        )
        below, above = seconds_of
        return bootstrap_ratio(above, below)

    def equal_answers(self, name: str, reference: str, end_tokens: frozenset[int]) -> Agreement | None:
        """Compare a contender's answers with those of another one, in its worst round; None if that is not measured."""
        if reference not in self.reports:
            return None
        first = self.reports[reference][min(self.reports[reference])]["prompts"]
        worst: Agreement | None = None
        for report in self.reports[name].values():
            answers = [[prompt["answer"] for prompt in prompts] for prompts in (report["prompts"], first)]
            found = agreement(answers[0], answers[1], end_tokens)
            worst = found if worst is None or found.leading < worst.leading else worst
        return worst

    def fastest(self, *, precision_class: str, own: bool, speculates: bool | None) -> str | None:
        """Return the contender of a class with the most tokens per second; `speculates` None admits both kinds."""
        names = [
            name
            for name, facts in self.contenders.items()
            if facts["precision_class"] == precision_class
            and facts["own"] == own
            and speculates in (None, facts["speculates"])
        ]
        return max(names, key=lambda name: statistics.median(self.per_round(name, token_rate)), default=None)


def seconds(prompt: Mapping[str, Any]) -> float:
    """Return the seconds of decoding per token of one answer."""
    return float(prompt["decode_seconds"]) / int(prompt["tokens"])


def token_rate(report: Report) -> float:
    """Return decoded tokens per second, over all prompts."""
    total: float = sum(prompt["tokens"] for prompt in report["prompts"])
    return total / float(sum(prompt["decode_seconds"] for prompt in report["prompts"]))


def bootstrap_ratio(above: NDArray[np.float64], below: NDArray[np.float64], seed: int = 0) -> Interval:
    """Return sum(above) / sum(below) with a bootstrap interval over rounds and prompts.

    Every resample draws rounds and prompts with replacement, the same for both: pairs stay together.

    Args:
        above: One number for each round and prompt, shape (R, P).
        below: The same of what it is compared with, shape (R, P).
        seed: Of the resamples.

    Raises:
        ValueError: The shapes differ.
    """
    if above.shape != below.shape:
        raise ValueError(f"shapes {above.shape} and {below.shape}: expected the same rounds and prompts")
    rounds, prompts = above.shape
    random = np.random.default_rng(seed)
    # a draw is how often each round and each prompt occurs in it
    round_counts = random.multinomial(rounds, np.full(rounds, 1 / rounds), size=DRAWS)  # (DRAWS, R)
    prompt_counts = random.multinomial(prompts, np.full(prompts, 1 / prompts), size=DRAWS)  # (DRAWS, P)
    sums = [np.einsum("dr,rp,dp->d", round_counts, values, prompt_counts) for values in (above, below)]
    tails = [50 * (1 - COVERAGE), 50 * (1 + COVERAGE)]
    low, high = np.percentile(sums[0] / sums[1], tails)
    return Interval(float(above.sum() / below.sum()), float(low), float(high))


@dataclass(frozen=True)
class Agreement:
    """How far answers equal those of another contender, up to the first end token of the other one.

    Attributes:
        answers: Number of answers.
        equal: Answers that are equal.
        tokens: Tokens of all answers.
        leading: Tokens before the first difference.
    """

    answers: int
    equal: int
    tokens: int
    leading: int


def agreement(answers: list[list[int]], reference: list[list[int]], end_tokens: frozenset[int]) -> Agreement:
    """Compare answers with a reference; behind an end token, systems that must continue may do so differently."""
    leading, length = [], []
    for mine, theirs in zip(answers, reference, strict=True):
        end = next((at for at, token in enumerate(theirs) if token in end_tokens), len(theirs))
        pairs = zip(mine[:end], theirs[:end], strict=True)
        leading.append(next((at for at, (a, b) in enumerate(pairs) if a != b), end))
        length.append(end)
    equal = sum(a == b for a, b in zip(leading, length, strict=True))
    return Agreement(len(leading), equal, sum(length), sum(leading))
