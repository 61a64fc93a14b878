"""Draws the four plots of the page; each function returns SVG, or None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from medusa_runtime.facts import PLAIN

from medusa_exporter.bench.results import Case
from medusa_exporter.report.ratios import ReportData, Series
from medusa_exporter.report.results import BenchResult
from medusa_exporter.report.svg import MARKERS, MUTED, SERIES, TEXT, as_svg, new_figure, style

WIDTH = 10.5  # inches, as wide as the page
LEGEND = 140  # characters of a legend that fit into the width; a line's sample takes 8


def latency(data: ReportData) -> str | None:
    """Draw step latency over KV cache length: a panel for each backend, with a line for each profile and the bound."""
    with style():
        series = [one for one in data.series if _timed(data.results_of(one))]
        if not series:
            return None
        figure, axes = new_figure(WIDTH, 4.0, len(series), sharex=True, sharey=True)
        names = [*dict.fromkeys(result.profile for result in data.results if not result.is_plain)]
        line_styles = {PLAIN: _line_style(TEXT, 0)} | {
            name: _line_style(_colour(at), at + 1) for at, name in enumerate(names)
        }
        shown: dict[str, Any] = {}
        for panel, one in zip(axes, series, strict=True):
            for name, line_style in line_styles.items():
                results = sorted(
                    (result for result in _timed(data.results_of(one)) if result.profile == name), key=_past
                )
                if not results:
                    continue
                middle = [result.step_ms["p50"] or 0.0 for result in results]
                (shown[name],) = panel.plot([*map(_past, results)], middle, **line_style)
                ends = [[result.step_ms[end] or 0.0 for result in results] for end in ("p10", "p90")]
                panel.vlines([*map(_past, results)], *ends, color=line_style["color"], alpha=0.4, linewidth=2)
            bound = sorted(
                (_past(result), result.memory_bound_ms)
                for result in data.results_of(one)
                if result.memory_bound_ms and result.mean_past_length
            )
            if bound:
                label = "memory bound"
                (shown[label],) = panel.plot(*zip(*bound, strict=True), color=MUTED, linestyle=(0, (4, 3)))
            panel.set_title(data.label(one))
            panel.set_xlabel("tokens in the KV cache")
        axes[0].set_ylabel("ms per step")
        axes[0].set_ylim(bottom=0)
        _legend(figure, shown)
        return as_svg(figure, "latency")


def throughput(data: ReportData) -> str | None:
    """Draw tokens per second of each backend, for plain decoding and for its best tree, grouped by case."""
    with style():
        cases = [case for case in data.cases if any(_rate(data, one, case, tree=False) for one in data.series)]
        if not cases:
            return None
        figure, (panel,) = new_figure(WIDTH, 4.0)
        width = 0.8 / (2 * len(data.series))
        shown: dict[str, Any] = {}
        for number, series in enumerate(data.series):
            tree = data.best_tree(series)
            for half, name in enumerate([PLAIN, tree] if tree else [PLAIN]):
                heights = [_rate(data, series, case, tree=bool(half)) for case in cases]
                places = [at - 0.4 + (2 * number + half + 0.5) * width for at in range(len(cases))]
                bars = panel.bar(places, heights, 0.92 * width, color=_colour(number), alpha=1.0 if half else 0.4)
                shown[f"{data.label(series)}, {name}"] = bars
                for place, height, case in zip(places, heights, cases, strict=True):
                    result = data.find(series, case, tree=bool(half))
                    text = f"{height:.0f}"
                    if half and result is not None and result.speedup is not None:
                        text += f"\n×{result.speedup:.2f}"
                    if height:
                        panel.text(place, height, text, ha="center", va="bottom", fontsize=8)
        panel.set_xticks(range(len(cases)), [_case_label(case) for case in cases])
        panel.grid(visible=False, axis="x")
        panel.margins(y=0.16)
        panel.set_ylabel("tokens per second")
        panel.set_xlabel("prompt tokens + answer tokens")
        _legend(figure, shown)
        return as_svg(figure, "throughput")


def tree_sizes(data: ReportData) -> str | None:
    """Draw tokens per step, overhead and speed-up over the size of the tree: medians and ranges over cases."""
    with style():
        series = [one for one in data.series if any(not result.is_plain for result in data.results_of(one))]
        if not series:
            return None
        figure, axes = new_figure(WIDTH, 3.6, 3)
        shown: dict[str, Any] = {}
        kinds = (
            ("tokens_per_step", "tokens per step"),
            ("overhead", "overhead: step time ÷ plain step time"),
            ("speedup", "speed-up"),
        )
        for panel, (metric, title) in zip(axes, kinds, strict=True):
            for number, one in enumerate(series):
                sizes: dict[int, list[float]] = {}
                for result in data.results_of(one):
                    if (value := getattr(result, metric)) is not None:
                        sizes.setdefault(result.nodes, []).append(value)
                nodes = sorted(sizes)
                line_style = _line_style(_colour(number), number)
                (shown[data.label(one)],) = panel.plot(nodes, [median(sizes[size]) for size in nodes], **line_style)
                ends = ([end(sizes[size]) for size in nodes] for end in (min, max))
                panel.vlines(nodes, *ends, color=line_style["color"], alpha=0.4, linewidth=2)
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter(lambda value, _at: f"{value:g}")
            panel.axhline(1, color=MUTED, linewidth=1)
            panel.set_title(title)
            panel.set_xlabel("tree nodes (1: plain decoding)")
        _legend(figure, shown)
        return as_svg(figure, "trees")


def first_token(data: ReportData) -> str | None:
    """Draw the time to the first token over the prompt length, where prompts have a fixed length."""
    with style():
        found = {one: _prompt_times(data.results_of(one)) for one in data.series}
        found = {one: times for one, times in found.items() if times}
        if not found:
            return None
        figure, (panel,) = new_figure(WIDTH, 3.4)
        shown: dict[str, Any] = {}
        for number, (series, times) in enumerate(found.items()):
            lengths = sorted(times)
            line_style = _line_style(_colour(number), number)
            (shown[data.label(series)],) = panel.plot(lengths, [times[length][0] for length in lengths], **line_style)
            ends = ([times[length][end] for length in lengths] for end in (0, 1))
            panel.vlines(lengths, *ends, color=line_style["color"], alpha=0.4, linewidth=2)
        panel.set_xlabel("prompt tokens")
        panel.set_ylabel("time to first token, ms")
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
        _legend(figure, shown)
        return as_svg(figure, "first-token")


def _prompt_times(results: Sequence[BenchResult]) -> dict[int, tuple[float, float]]:
    """Return median and 90th percentile by prompt length: medians over profiles, since a prefill uses no tree."""
    found: dict[int, list[BenchResult]] = {}
    for result in results:
        if result.prompt_length is not None and result.ttft_ms["p50"] is not None:
            found.setdefault(result.prompt_length, []).append(result)
    return {
        length: (
            median(result.ttft_ms["p50"] or 0.0 for result in of_length),
            median(result.ttft_ms["p90"] or 0.0 for result in of_length),
        )
        for length, of_length in found.items()
    }


def _timed(results: Sequence[BenchResult]) -> list[BenchResult]:
    return [result for result in results if result.mean_past_length is not None and result.step_ms["p50"] is not None]


def _past(result: BenchResult) -> float:
    return result.mean_past_length or 0.0


def _rate(data: ReportData, series: Series, case: Case, *, tree: bool) -> float:
    result = data.find(series, case, tree=tree)
    return (result.tokens_per_second or 0.0) if result is not None else 0.0


def _case_label(case: Case) -> str:
    prompt = "as is" if case.prompt_length is None else f"{case.prompt_length:,}"
    return f"{prompt}\n+ {case.max_new_tokens:,}"


def _colour(number: int) -> str:
    return SERIES[number % len(SERIES)]


def _line_style(colour: str, number: int) -> dict[str, Any]:
    return {"color": colour, "marker": MARKERS[number % len(MARKERS)], "markersize": 5, "linewidth": 1.6}


def _legend(figure: Any, shown: dict[str, Any]) -> None:
    columns = max(1, min(len(shown), LEGEND // (max(map(len, shown)) + 8)))
    figure.legend(shown.values(), shown.keys(), loc="outside lower left", ncols=columns)
