"""The page's four plots."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from medusa_runtime.facts import PLAIN

from medusa_exporter.bench.results import Case
from medusa_exporter.report.ratios import ReportData, Series
from medusa_exporter.report.results import BenchResult
from medusa_exporter.report.svg import MARKERS, MUTED, SERIES, TEXT, as_svg, new_figure, style

WIDTH = 10.5  # inches: the page is as wide


def latency(page: ReportData) -> str | None:
    """Step latency against the length of the past: a panel for each backend, a line for each profile, and the bound.

    None where no step was taken.
    """
    with style():
        series = [one for one in page.series if _timed(page.of(one))]
        if not series:
            return None
        figure, axes = new_figure(WIDTH, 4.0, len(series), sharex=True, sharey=True)
        names = [*dict.fromkeys(cell.profile for cell in page.cells if not cell.is_plain)]
        looks = {PLAIN: _look(TEXT, 0)} | {name: _look(_colour(at), at + 1) for at, name in enumerate(names)}
        shown: dict[str, Any] = {}
        for panel, one in zip(axes, series, strict=True):
            for name, look in looks.items():
                cells = sorted((cell for cell in _timed(page.of(one)) if cell.profile == name), key=_past)
                if not cells:
                    continue
                middle = [cell.step_ms["p50"] or 0.0 for cell in cells]
                (shown[name],) = panel.plot([*map(_past, cells)], middle, **look)
                ends = [[cell.step_ms[end] or 0.0 for cell in cells] for end in ("p10", "p90")]
                panel.vlines([*map(_past, cells)], *ends, color=look["color"], alpha=0.4, linewidth=2)
            bound = sorted((_past(cell), cell.bound_ms) for cell in page.of(one) if cell.bound_ms and cell.kv_length)
            if bound:
                label = "memory bandwidth"
                (shown[label],) = panel.plot(*zip(*bound, strict=True), color=MUTED, linestyle=(0, (4, 3)))
            panel.set_title(page.label(one))
            panel.set_xlabel("rows of the past")
        axes[0].set_ylabel("a step, ms")
        axes[0].set_ylim(bottom=0)
        _legend(figure, shown)
        return as_svg(figure, "latency")


def rates(page: ReportData) -> str | None:
    """Tokens a second of every backend, plain and by its best tree, grouped by case. None where nothing was decoded."""
    with style():
        cases = [case for case in page.cases if any(_rate(page, one, case, tree=False) for one in page.series)]
        if not cases:
            return None
        figure, (panel,) = new_figure(WIDTH, 4.0)
        width = 0.8 / (2 * len(page.series))
        shown: dict[str, Any] = {}
        for number, series in enumerate(page.series):
            tree = page.best_tree(series)
            for half, name in enumerate([PLAIN, tree] if tree else [PLAIN]):
                heights = [_rate(page, series, case, tree=bool(half)) for case in cases]
                places = [at - 0.4 + (2 * number + half + 0.5) * width for at in range(len(cases))]
                bars = panel.bar(places, heights, 0.92 * width, color=_colour(number), alpha=1.0 if half else 0.4)
                shown[f"{page.label(series)}, {name}"] = bars
                for place, height, case in zip(places, heights, cases, strict=True):
                    cell = page.chosen(series, case, tree=bool(half))
                    text = f"{height:.0f}"
                    if half and cell is not None and cell.speedup is not None:
                        text += f"\n×{cell.speedup:.2f}"
                    if height:
                        panel.text(place, height, text, ha="center", va="bottom", fontsize=8)
        panel.set_xticks(range(len(cases)), [_case_label(case) for case in cases])
        panel.grid(visible=False, axis="x")
        panel.margins(y=0.16)
        panel.set_ylabel("tokens a second")
        panel.set_xlabel("tokens of the prompt + tokens of the answer")
        _legend(figure, shown)
        return as_svg(figure, "rates")


def trees(page: ReportData) -> str | None:
    """Tokens a step, overhead and speed-up by the tree's size: medians over cases, smallest to largest."""
    with style():
        series = [one for one in page.series if any(not cell.is_plain for cell in page.of(one))]
        if not series:
            return None
        figure, axes = new_figure(WIDTH, 3.6, 3)
        shown: dict[str, Any] = {}
        kinds = (("tokens_per_step", "tokens a step"), ("overhead", "overhead of a step"), ("speedup", "speed-up"))
        for panel, (figure_name, title) in zip(axes, kinds, strict=True):
            for number, one in enumerate(series):
                sizes: dict[int, list[float]] = {}
                for cell in page.of(one):
                    if (value := getattr(cell, figure_name)) is not None:
                        sizes.setdefault(cell.nodes, []).append(value)
                nodes = sorted(sizes)
                look = _look(_colour(number), number)
                (shown[page.label(one)],) = panel.plot(nodes, [median(sizes[size]) for size in nodes], **look)
                ends = ([end(sizes[size]) for size in nodes] for end in (min, max))
                panel.vlines(nodes, *ends, color=look["color"], alpha=0.4, linewidth=2)
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter(lambda value, _at: f"{value:g}")
            panel.axhline(1, color=MUTED, linewidth=1)
            panel.set_title(title)
            panel.set_xlabel("nodes (1: plain decoding)")
        _legend(figure, shown)
        return as_svg(figure, "trees")


def first_token(page: ReportData) -> str | None:
    """Time to the first token by the prompt's length. None where prompts had no given length."""
    with style():
        found = {one: _prompt_times(page.of(one)) for one in page.series}
        found = {one: times for one, times in found.items() if times}
        if not found:
            return None
        figure, (panel,) = new_figure(WIDTH, 3.4)
        shown: dict[str, Any] = {}
        for number, (series, times) in enumerate(found.items()):
            lengths = sorted(times)
            look = _look(_colour(number), number)
            (shown[page.label(series)],) = panel.plot(lengths, [times[length][0] for length in lengths], **look)
            ends = ([times[length][end] for length in lengths] for end in (0, 1))
            panel.vlines(lengths, *ends, color=look["color"], alpha=0.4, linewidth=2)
        panel.set_xlabel("tokens of the prompt")
        panel.set_ylabel("to the first token, ms")
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
        _legend(figure, shown)
        return as_svg(figure, "first-token")


def _prompt_times(cells: Sequence[BenchResult]) -> dict[int, tuple[float, float]]:
    """By prompt length the median and the 90th percentile, medians over profiles: the prefill knows no tree."""
    found: dict[int, list[BenchResult]] = {}
    for cell in cells:
        if cell.prompt_length is not None and cell.ttft_ms["p50"] is not None:
            found.setdefault(cell.prompt_length, []).append(cell)
    return {
        length: (
            median(cell.ttft_ms["p50"] or 0.0 for cell in of),
            median(cell.ttft_ms["p90"] or 0.0 for cell in of),
        )
        for length, of in found.items()
    }


def _timed(cells: Sequence[BenchResult]) -> list[BenchResult]:
    return [cell for cell in cells if cell.kv_length is not None and cell.step_ms["p50"] is not None]


def _past(cell: BenchResult) -> float:
    return cell.kv_length or 0.0


def _rate(page: ReportData, series: Series, case: Case, *, tree: bool) -> float:
    cell = page.chosen(series, case, tree=tree)
    return (cell.tokens_per_second or 0.0) if cell is not None else 0.0


def _case_label(case: Case) -> str:
    prompt = "own" if case.prompt_length is None else f"{case.prompt_length:,}"
    return f"{prompt}\n+ {case.max_new_tokens:,}"


def _colour(number: int) -> str:
    return SERIES[number % len(SERIES)]


def _look(colour: str, number: int) -> dict[str, Any]:
    return {"color": colour, "marker": MARKERS[number % len(MARKERS)], "markersize": 5, "linewidth": 1.6}


def _legend(figure: Any, shown: dict[str, Any]) -> None:
    columns = len(shown) if len(shown) <= 6 else 4
    figure.legend(shown.values(), shown.keys(), loc="outside lower left", ncols=columns)
