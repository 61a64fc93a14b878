"""Writes the page: one HTML file that needs no other, no network and no script."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from medusa_exporter.report import plots
from medusa_exporter.report.ratios import Ratio, ReportData
from medusa_exporter.report.results import BenchResult
from medusa_exporter.report.runs import BenchRun

SMALL, LARGE = 10, 100  # from where on a figure has one digit behind the point, or none


def render(runs: Sequence[BenchRun]) -> str:
    """Return the page of these runs, one at least. Raises MissingExtraError without matplotlib."""
    page = ReportData(runs)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "ratio": ratio, "span": span}
    files = [*dict.fromkeys(str(run.prompts["file"]) for run in runs)]
    return environment.get_template("page.html.jinja").render(
        model=runs[0].model,
        runs=runs,
        page=page,
        devices=[*dict.fromkeys(run.device(name) for run in runs for name in run.backends)],
        forced=any(run.forced for run in runs),
        other_prompts=files if len(files) > 1 else [],
        headlines=page.headlines(),
        pairs=page.pairs(),
        plots=[*_plots(page)],
        rows=[*_rows(page)],
    )


def number(value: float | None) -> str:
    """A figure in three digits or so."""
    if value is None:
        return "–"
    return f"{value:.2f}" if value < SMALL else f"{value:.1f}" if value < LARGE else f"{value:,.0f}"


def ratio(value: float) -> str:
    """As "2.11×"."""
    return f"{value:.2f}×"


def span(value: Ratio) -> str:
    """Smallest and largest, where there are several cases."""
    if value.cases == 1:
        return ""
    return f" ({value.least:.2f} to {value.most:.2f}, median of {value.cases} cases)"


def _plots(page: ReportData) -> Iterator[tuple[str, str, Markup]]:
    """Title, caption and plot of each that there is something to draw for."""
    kinds = (
        (
            "Backends",
            "Tokens a second, prefill left out: plain decoding (pale) and each backend's best tree, with its speed-up "
            "over its own plain decoding.",
            plots.rates,
        ),
        (
            "Step latency and the length of the past",
            "The median step of plain decoding and of each tree; thin lines reach from the 10th to the 90th "
            "percentile. Dashed, where the memory was timed: what reading weights and past takes at its bandwidth.",
            plots.latency,
        ),
        (
            "Trees by size",
            "Medians over all cases; thin lines reach from the smallest to the largest.",
            plots.trees,
        ),
        (
            "Time to the first token",
            "The median over prompts; thin lines reach to the 90th percentile.",
            plots.first_token,
        ),
    )
    for title, caption, draw in kinds:
        if (plot := draw(page)) is not None:
            label = str(Markup.escape(f"{title}. {caption}"))
            yield title, caption, Markup(plot.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))  # noqa: S704


def _rows(page: ReportData) -> Iterator[tuple[BenchResult, tuple[float, bool] | None, bool]]:
    """Every cell by case, what it is over the best, and whether a new case begins with it."""
    for case in page.cases:
        first = True
        for cell in page.cells:
            if cell.case == case:
                yield cell, page.over_best(cell), first
                first = False
