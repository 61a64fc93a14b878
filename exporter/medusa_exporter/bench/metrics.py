"""What runs boil down to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from medusa_profiles.profile import TreeProfile

from medusa_exporter.bench.timing import Generation, Measurement

METRICS = ("tokens_per_step", "plain_step_ms", "medusa_step_ms", "overhead", "speedup", "host_us_per_step")
PERCENTILES = (10, 50, 90)
SLOWEST = 10  # steps that are told one by one

Pair = tuple[Generation, Generation]  # plain decoding's and the tree's


def aggregate(turns: Sequence[Measurement], profile: TreeProfile, *, ends: bool = True) -> dict[str, Any]:
    """Boil turns down to one profile's result, "plain" being one too: figures over all, and their spread over prompts.

    Figures are ratios of sums, so a long answer weighs more than a short one; percentiles of steps are over all steps,
    those of the time to the first token over prompts. `tokens_per_second` and `tpot_ms` leave the prefill out.
    `speedup` counts the turns whose tokens are plain decoding's, or, where answers do not end by themselves (`ends`),
    all: they have the same length. A figure is None where no step was taken.
    """
    by_prompt: dict[int, list[Pair]] = defaultdict(list)
    for turn in turns:
        by_prompt[turn.question.prompt].append((turn.plain, turn.run(profile.name)))
    single = [_figures(pairs, ends) for pairs in by_prompt.values()]
    parted = [(turn, turn.differences[profile.name]) for turn in turns if profile.name in turn.differences]
    gaps = [difference.gap for _, difference in parted if difference.gap is not None]
    shares = [difference.share for _, difference in parted if difference.share is not None]
    runs = [turn.run(profile.name) for turn in turns]
    steps = [1e3 * seconds for run in runs for seconds in run.step_seconds]
    first = [1e3 * run.first_seconds for run in runs]
    decoded = [run for run in runs if run.steps]
    seconds, tokens = sum(run.seconds for run in decoded), sum(len(run.tokens) - 1 for run in decoded)
    return {
        "profile": profile.name,
        "nodes": profile.size,
        "turns": len(turns),
        **_figures([pair for pairs in by_prompt.values() for pair in pairs], ends),
        "step_ms": {"mean": _ratio(sum(steps), len(steps)), **_percentiles(steps, (10, 50, 90, 99))},
        "slowest_steps": _slowest(turns, profile.name),
        "ttft_ms": _percentiles(first, (50, 90)),
        "tpot_ms": _ratio(1e3 * seconds, tokens),
        "tokens_per_second": _ratio(tokens, seconds),
        "kv_length": _kv_length(turns, profile.name),
        "identical": not parted,
        "divergences": len(parted),
        "max_gap": max(gaps, default=None if parted else 0.0),
        "max_gap_share": max(shares, default=None if parted else 0.0),
        "failures": sum(difference.fails for _, difference in parted),
        "differences": [
            {"prompt": turn.question.prompt, "turn": turn.question.turn, **asdict(difference)}
            for turn, difference in parted
        ],
        "spread": {name: _percentiles([figures[name] for figures in single], PERCENTILES) for name in METRICS},
        "accepted": [list(run.kept) for run in runs],
    }


def by_category(
    turns: Sequence[Measurement], profile: TreeProfile, categories: Sequence[str | None]
) -> dict[str, dict[str, float | None]]:
    """Return `aggregate`'s figures for each category of prompts, and how many `prompts` of it were answered.

    categories: of prompt 1, 2, …; prompts without one are left out.
    """
    chosen: dict[str, list[Measurement]] = defaultdict(list)
    for turn in turns:
        if category := categories[turn.question.prompt - 1]:
            chosen[category].append(turn)
    return {
        category: {
            "prompts": len({turn.question.prompt for turn in of}),
            **_figures([(turn.plain, turn.run(profile.name)) for turn in of], ends=True),
        }
        for category, of in chosen.items()
    }


def _figures(pairs: Sequence[Pair], ends: bool) -> dict[str, float | None]:
    """Return METRICS over (plain, medusa) runs, and the sums that let runs on parts of a file be put together.

    Those are the tree's `tokens` (prefill's not among them), its `steps` and plain decoding's `plain_steps`.
    """
    plain, medusa = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    same = [pair for pair in pairs if pair[0].tokens == pair[1].tokens or not ends]
    tokens = sum(len(run.tokens) - 1 for run in medusa)
    steps, plain_steps = (sum(run.steps for run in runs) for runs in (medusa, plain))
    plain_ms = _ratio(1e3 * sum(run.seconds for run in plain), plain_steps)
    medusa_ms = _ratio(1e3 * sum(run.seconds for run in medusa), steps)
    return {
        "tokens": tokens,
        "steps": steps,
        "plain_steps": plain_steps,
        "tokens_per_step": _ratio(tokens, steps),
        "plain_step_ms": plain_ms,
        "medusa_step_ms": medusa_ms,
        "overhead": _ratio(medusa_ms or 0.0, plain_ms or 0.0),
        "speedup": _ratio(sum(pair[0].seconds for pair in same), sum(pair[1].seconds for pair in same)),
        "host_us_per_step": _ratio(1e6 * sum(run.host_seconds for run in medusa), steps),
    }


def _slowest(turns: Sequence[Measurement], profile: str) -> list[dict[str, float]]:
    """The steps that took longest, and where they stood in their answers: step 1 follows the prefill."""
    steps = [
        {"prompt": turn.question.prompt, "turn": turn.question.turn, "step": number, "ms": 1e3 * seconds}
        for turn in turns
        for number, seconds in enumerate(turn.run(profile).step_seconds, start=1)
    ]
    return sorted(steps, key=lambda step: -step["ms"])[:SLOWEST]


def _kv_length(turns: Sequence[Measurement], profile: str) -> float | None:
    """Rows of the past, the mean over steps: a prompt's own, and the tokens that the steps before have added."""
    rows = steps = 0
    for turn in turns:
        kept = turn.run(profile).kept
        rows += len(turn.question.ids) * len(kept) + int(np.cumsum(kept).sum()) - sum(kept)
        steps += len(kept)
    return _ratio(rows, steps)


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None


def _percentiles(values: Sequence[float | None], percents: Sequence[int]) -> dict[str, float | None]:
    """Return percentiles of the values there are, by name: "p50" and so on."""
    present = [value for value in values if value is not None]
    points = np.percentile(present, percents).tolist() if present else [None] * len(percents)
    return {f"p{percent}": point for percent, point in zip(percents, points, strict=True)}
