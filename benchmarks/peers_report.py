"""Summarises the reports of peers_worker.py: metrics, ratios between systems, tables and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medusa_exporter.files import atomic_write
from medusa_exporter.overwrite_check import Kind, starts_with

PLOT = Kind("benchmarks/peers.py --plot", starts_with(b"benchmarks/peers.py --plot"))
PLOT_TYPES = (".svg", ".png")
PLAIN, GENAI, LLAMA = "medusa plain", "genai", "llama.cpp"
EXTRA = "F16"  # shown for information, but not counted as a peer: it has another precision

Report = dict[str, Any]  # what a worker printed


@dataclass
class Contender:
    """A system under test: the job of its worker, without the prompts, and the reports of all rounds."""

    name: str
    python: str
    job: dict[str, Any]
    reports: list[Report] = field(default_factory=list)

    def per_round(self, metric: Callable[[Report], float]) -> list[float]:
        """Return one metric for each round."""
        return [metric(report) for report in self.reports]

    @property
    def is_peer(self) -> bool:
        """Whether this is another project's system, in the same precision as ours."""
        return self.name.startswith((GENAI, LLAMA)) and EXTRA not in self.name


def _total(report: Report, name: str) -> float:
    return sum(float(prompt[name]) for prompt in report["prompts"])


def _middle_ms(report: Report, name: str) -> float:
    return 1e3 * statistics.median(float(prompt[name]) for prompt in report["prompts"])


def step_ms(report: Report) -> float:
    """Return milliseconds per step: the median over prompts of each answer's mean."""
    means = [float(prompt["decode_seconds"]) / int(prompt["steps"]) for prompt in report["prompts"]]
    return 1e3 * statistics.median(means)


def typical_step_ms(report: Report) -> float:
    """Return milliseconds per typical step: the median over prompts of each answer's median."""
    return _middle_ms(report, "median_step_seconds")


def token_rate(report: Report) -> float:
    """Return decoded tokens per second, over all prompts."""
    return _total(report, "tokens") / _total(report, "decode_seconds")


def prefill_ms(report: Report) -> float:
    """Return milliseconds to the first token: the median over prompts."""
    return _middle_ms(report, "prefill_seconds")


def tokens_per_step(report: Report) -> float:
    """Return the tokens that a step adds, over all prompts; 1 without speculation."""
    return _total(report, "tokens") / _total(report, "steps")


def other_load(report: Report) -> float:
    """Return the share of the processors that other processes used, the mean over prompts."""
    return _total(report, "other_load") / len(report["prompts"])


METRICS: dict[str, Callable[[Report], float]] = {
    "step_ms": step_ms,
    "typical_step_ms": typical_step_ms,
    "tokens_per_second": token_rate,
    "tokens_per_step": tokens_per_step,
    "prefill_ms": prefill_ms,
    "other_load": other_load,
    "load_seconds": lambda report: float(report["load_seconds"]),
    "start_seconds": lambda report: float(report["start_seconds"]),
    "peak_memory_mb": lambda report: float(report["peak_memory_bytes"]) / 1e6,
}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Summarise one metric over the rounds."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": list(values)}


def ratio(ours: Contender, peer: Contender, metric: Callable[[Report], float]) -> dict[str, Any]:
    """Summarise ours / peer's round by round, since both ran shortly after each other in a round."""
    pairs = zip(ours.per_round(metric), peer.per_round(metric), strict=True)
    return spread([mine / theirs for mine, theirs in pairs])


def agreement(ours: Report, other: Report, eos: frozenset[int]) -> dict[str, Any]:
    """Count the leading tokens of each answer that are equal, up to the first end token of our answer.

    After an end token, a peer that must continue chooses its second most likely token.
    """
    equal, length = [], []
    for mine, theirs in zip(ours["prompts"], other["prompts"], strict=True):
        tokens = mine["answer"]
        end = next((at for at, token in enumerate(tokens) if token in eos), len(tokens))
        pairs = zip(tokens[:end], theirs["answer"][:end], strict=True)
        equal.append(next((at for at, (a, b) in enumerate(pairs) if a != b), end))
        length.append(end)
    return {
        "answers": len(equal),
        "answers_equal": sum(e == n for e, n in zip(equal, length, strict=True)),
        "tokens": sum(length),
        "leading_tokens_equal": sum(equal),
        "first_difference": [None if e == n else e for e, n in zip(equal, length, strict=True)],
    }


def _without_answer(prompt: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in prompt.items() if name != "answer"}


def best_peer(systems: Sequence[Contender]) -> Contender:
    """Return the fastest peer of the same precision, by the median over the rounds."""
    return max((one for one in systems if one.is_peer), key=lambda one: statistics.median(one.per_round(token_rate)))


def summarise(systems: Sequence[Contender], eos: frozenset[int]) -> dict[str, Any]:
    """Return all results of one precision, without the answers; the first system is our plain decoding."""
    plain, genai, best = systems[0], next(one for one in systems if one.name.startswith(GENAI)), best_peer(systems)
    last = {system.name: system.reports[-1] for system in systems}
    return {
        "systems": {
            system.name: {
                **{name: spread(system.per_round(metric)) for name, metric in METRICS.items()},
                "versions": last[system.name]["versions"],
                "agreement_with_plain": agreement(last[PLAIN], last[system.name], eos),
                "prompts": [[_without_answer(prompt) for prompt in report["prompts"]] for report in system.reports],
            }
            for system in systems
        },
        "best_peer": best.name,
        "plain_step_over_genai": ratio(plain, genai, step_ms),
        "plain_typical_step_over_genai": ratio(plain, genai, typical_step_ms),
        "token_rate_over_plain": {system.name: ratio(system, plain, token_rate) for system in systems},
        "token_rate_over_best_peer": {system.name: ratio(system, best, token_rate) for system in systems},
    }


def print_table(precision: str, result: dict[str, Any]) -> None:
    """Print the medians over the rounds, with the smallest and largest values in brackets."""

    def cell(figure: dict[str, Any], digits: int) -> str:
        return f"{figure['median']:.{digits}f} ({figure['min']:.{digits}f}–{figure['max']:.{digits}f})"

    columns = (
        precision,
        "ms/step",
        "typical step",
        "tokens/s",
        "tokens/step",
        "× plain",
        f"× {result['best_peer']}",
        "prefill ms",
        "start s",
        "other load",
        "tokens as plain",
    )
    rows = [columns]
    for name, system in result["systems"].items():
        same = system["agreement_with_plain"]
        rows.append(
            (
                name,
                cell(system["step_ms"], 2),
                f"{system['typical_step_ms']['median']:.2f}",
                cell(system["tokens_per_second"], 1),
                f"{system['tokens_per_step']['median']:.3f}",
                cell(result["token_rate_over_plain"][name], 2),
                cell(result["token_rate_over_best_peer"][name], 2),
                f"{system['prefill_ms']['median']:.0f}",
                f"{system['start_seconds']['median']:.2f}",
                f"{system['other_load']['median']:.0%}",
                f"{same['leading_tokens_equal']}/{same['tokens']} "
                f"({same['answers_equal']}/{same['answers']} answers complete)",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    print(f"plain step, ours / genai: {cell(result['plain_step_over_genai'], 3)} over whole answers, ", end="")
    print(f"{cell(result['plain_typical_step_over_genai'], 3)} by the typical step\n")


def plot(precisions: dict[str, dict[str, Any]], file: Path) -> None:
    """Plot the tokens per second of every system: medians and ranges, with a panel for each precision."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(precisions), 3.6), layout="constrained")
    panels = figure.subplots(1, len(precisions), squeeze=False)[0]
    for panel, (precision, result) in zip(panels, precisions.items(), strict=True):
        names = list(result["systems"])
        rates = [result["systems"][name]["tokens_per_second"] for name in names]
        middle = [rate["median"] for rate in rates]
        spread_of = [
            [value - rate["min"] for value, rate in zip(middle, rates, strict=True)],
            [rate["max"] - value for value, rate in zip(middle, rates, strict=True)],
        ]
        colours = ["tab:blue" if name.startswith("medusa") else "tab:gray" for name in names]
        panel.barh(names, middle, xerr=spread_of, color=colours)
        panel.invert_yaxis()
        panel.set_title(precision)
        panel.set_xlabel("tokens per second")
    FigureCanvasAgg(figure)
    named = {"Creator": PLOT.maker, "Date": None} if file.suffix == ".svg" else {"Software": PLOT.maker}
    with atomic_write(file) as target:
        figure.savefig(target, format=file.suffix[1:], metadata=named)
