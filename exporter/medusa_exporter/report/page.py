"""Renders the page: one HTML file without scripts, which needs no other files and no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from medusa_exporter.report import plots
from medusa_exporter.report.ratios import Ratio, ReportData
from medusa_exporter.report.results import BenchResult
from medusa_exporter.report.runs import BenchRun

SMALL, LARGE = 10, 100  # from these values on, a number has one decimal place, or none


def render_page(runs: Sequence[BenchRun]) -> str:
    """Return the HTML of at least one run; MissingExtraError if matplotlib is not installed."""
    data = ReportData(runs)
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
        data=data,
        devices=[*dict.fromkeys(run.device(name) for run in runs for name in run.backends)],
        forced=any(run.forced for run in runs),
        other_prompts=files if len(files) > 1 else [],
        best_trees=data.best_trees(),
        backend_ratios=data.backend_ratios(),
        plots=[*_plots(data)],
        rows=[*_rows(data)],
    )


def number(value: float | None) -> str:
    """Format a value with about three digits."""
    if value is None:
        return "–"
    return f"{value:.2f}" if value < SMALL else f"{value:.1f}" if value < LARGE else f"{value:,.0f}"


def ratio(value: float) -> str:
    """Format a ratio, for example "2.11×"."""
    return f"{value:.2f}×"


def span(value: Ratio) -> str:
    """Format the smallest and the largest ratio, where there are several cases."""
    if value.cases == 1:
        return ""
    return f" ({value.smallest:.2f} to {value.largest:.2f}, median of {value.cases} cases)"


def _plots(data: ReportData) -> Iterator[tuple[str, str, Markup]]:
    """Yield title, caption and SVG of each plot that is not empty."""
    kinds = (
        (
            "Backends",
            "Tokens per second without the prefill: plain decoding (pale) and the best tree of each backend, with its "
            "speed-up over the backend's own plain decoding.",
            plots.throughput,
        ),
        (
            "Step latency and KV cache length",
            "The median step of plain decoding and of each tree; thin lines show the 10th to the 90th percentile. "
            "Dashed, where the memory bandwidth was measured: the time to read the weights and the KV cache once.",
            plots.latency,
        ),
        (
            "Trees by size",
            "Medians over all cases; thin lines show the smallest and the largest value.",
            plots.tree_sizes,
        ),
        (
            "Time to the first token",
            "The median over prompts; thin lines show the 90th percentile.",
            plots.first_token,
        ),
    )
    for title, caption, draw in kinds:
        if (plot := draw(data)) is not None:
            label = str(Markup.escape(f"{title}. {caption}"))
            yield title, caption, Markup(plot.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))  # noqa: S704


def _rows(data: ReportData) -> Iterator[tuple[BenchResult, tuple[float, bool] | None, bool]]:
    """Yield each result by case, its ratio over the best plain decoding, and whether it is the first of its case."""
    for case in data.cases:
        first = True
        for result in data.results:
            if result.case == case:
                yield result, data.over_best_plain(result), first
                first = False
