"""Computes the metrics of a profile from its measurements: speed, tokens per step, time per step, percentiles."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from medusa_profiles.profile import TreeProfile

from medusa_exporter.bench.timing import Measurement, TimedAnswer

METRICS = ("tokens_per_step", "plain_step_ms", "medusa_step_ms", "overhead", "speedup", "host_us_per_step")
PERCENTILES = (10, 50, 90)
SLOWEST = 10  # steps that are reported one by one

Pair = tuple[TimedAnswer, TimedAnswer]  # the answers with plain decoding and with the tree


def aggregate(measurements: Sequence[Measurement], profile: TreeProfile, *, stop_at_eos: bool = True) -> dict[str, Any]:
    """Return the metrics of one profile over all measurements, and their percentiles over prompts.

    Metrics are ratios of sums, so that a long answer counts more than a short one. Percentiles of steps are over all
    steps, those of the time to the first token over prompts. `tokens_per_second` and `tpot_ms` do not include the
    prefill. A metric is None where no step was run.

    Args:
        measurements: The answers of one backend, to at least one prompt.
        profile: The tree, or the profile of plain decoding.
        stop_at_eos: Whether end tokens end the answers. Then `speedup` counts only the answers that are identical to
            plain decoding's; otherwise all, since all have the same length.
    """
    name = profile.name
    by_prompt: dict[int, list[Pair]] = defaultdict(list)
    for one in measurements:
        by_prompt[one.question.prompt].append((one.plain, one.generation(name)))
    of_prompts = [_metrics(pairs, stop_at_eos) for pairs in by_prompt.values()]
    differing = [(one, one.differences[name]) for one in measurements if name in one.differences]
    gaps = [difference.gap for _, difference in differing if difference.gap is not None]
    shares = [difference.share for _, difference in differing if difference.share is not None]
    answers = [one.generation(name) for one in measurements]
    steps = [1e3 * seconds for answer in answers for seconds in answer.step_seconds]
    first = [1e3 * answer.first_seconds for answer in answers]
    decoded = [answer for answer in answers if answer.steps]
    seconds, tokens = sum(answer.seconds for answer in decoded), sum(len(answer.tokens) - 1 for answer in decoded)
    return {
        "profile": name,
        "nodes": profile.size,
        "turns": len(measurements),
        **_metrics([pair for pairs in by_prompt.values() for pair in pairs], stop_at_eos),
        "step_ms": {"mean": _ratio(sum(steps), len(steps)), **_percentiles(steps, (10, 50, 90, 99))},
        "slowest_steps": _slowest_steps(measurements, name),
        "ttft_ms": _percentiles(first, (50, 90)),
        "tpot_ms": _ratio(1e3 * seconds, tokens),
        "tokens_per_second": _ratio(tokens, seconds),
        "mean_past_length": _mean_past_length(measurements, name),
        "identical": not differing,
        "divergences": len(differing),
        "max_logit_gap": max(gaps, default=None if differing else 0.0),
        "max_logit_gap_share": max(shares, default=None if differing else 0.0),
        "mismatches": sum(difference.fails for _, difference in differing),
        "differences": [
            {"prompt": one.question.prompt, "turn": one.question.turn, **asdict(difference)}
            for one, difference in differing
        ],
        "percentiles_over_prompts": {
            metric: _percentiles([metrics[metric] for metrics in of_prompts], PERCENTILES) for metric in METRICS
        },
        "tokens_added_by_steps": [list(answer.kept) for answer in answers],
    }


def by_category(
    measurements: Sequence[Measurement], profile: TreeProfile, categories: Sequence[str | None]
) -> dict[str, dict[str, float | None]]:
    """Return the metrics of each category of prompts, with the number of `prompts` that were answered.

    Args:
        measurements: The answers of one backend.
        profile: The tree, or the profile of plain decoding.
        categories: The category of prompt 1, 2, …; prompts with None are left out.
    """
    chosen: dict[str, list[Measurement]] = defaultdict(list)
    for one in measurements:
        if category := categories[one.question.prompt - 1]:
            chosen[category].append(one)
    return {
        category: {
            "prompts": len({one.question.prompt for one in of_category}),
            **_metrics([(one.plain, one.generation(profile.name)) for one in of_category], stop_at_eos=True),
        }
        for category, of_category in chosen.items()
    }


def _metrics(pairs: Sequence[Pair], stop_at_eos: bool) -> dict[str, float | None]:
    """Return METRICS, and the sums with which results on parts of a prompt file can be combined.

    These are the tree's `tokens` (without those of the prefill), its `steps`, and plain decoding's `plain_steps`.
    """
    plain, medusa = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    same = [pair for pair in pairs if pair[0].tokens == pair[1].tokens or not stop_at_eos]
    tokens = sum(len(answer.tokens) - 1 for answer in medusa)
    steps, plain_steps = (sum(answer.steps for answer in answers) for answers in (medusa, plain))
    plain_ms = _ratio(1e3 * sum(answer.seconds for answer in plain), plain_steps)
    medusa_ms = _ratio(1e3 * sum(answer.seconds for answer in medusa), steps)
    return {
        "tokens": tokens,
        "steps": steps,
        "plain_steps": plain_steps,
        "tokens_per_step": _ratio(tokens, steps),
        "plain_step_ms": plain_ms,
        "medusa_step_ms": medusa_ms,
        "overhead": _ratio(medusa_ms or 0.0, plain_ms or 0.0),
        "speedup": _ratio(sum(pair[0].seconds for pair in same), sum(pair[1].seconds for pair in same)),
        "host_us_per_step": _ratio(1e6 * sum(answer.host_seconds for answer in medusa), steps),
    }


def _slowest_steps(measurements: Sequence[Measurement], profile: str) -> list[dict[str, float]]:
    """Return the steps that took longest, with their number in the answer: step 1 follows the prefill."""
    steps = [
        {"prompt": one.question.prompt, "turn": one.question.turn, "step": number, "ms": 1e3 * seconds}
        for one in measurements
        for number, seconds in enumerate(one.generation(profile).step_seconds, start=1)
    ]
    return sorted(steps, key=lambda step: -step["ms"])[:SLOWEST]


def _mean_past_length(measurements: Sequence[Measurement], profile: str) -> float | None:
    """Return the KV cache rows that a step finds, the mean over steps.

    Example: after a prompt of 100 tokens, steps that add 3, 1 and 1 tokens find 100, 103 and 104 rows.
    """
    rows = steps = 0
    for one in measurements:
        kept = one.generation(profile).kept
        rows += len(one.question.ids) * len(kept) + int(np.cumsum(kept).sum()) - sum(kept)
        steps += len(kept)
    return _ratio(rows, steps)


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None


def _percentiles(values: Sequence[float | None], percents: Sequence[int]) -> dict[str, float | None]:
    """Return percentiles of the values that are not None, by name: "p50" and so on."""
    present = [value for value in values if value is not None]
    points = np.percentile(present, percents).tolist() if present else [None] * len(percents)
    return {f"p{percent}": point for percent, point in zip(percents, points, strict=True)}
