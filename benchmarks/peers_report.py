"""Tables and a plot of the results of peers.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medusa_exporter import console
from medusa_exporter.files import atomic_write
from medusa_exporter.overwrite_check import Kind, starts_with
from peers_contenders import CLASSES, EXTRA
from peers_results import Interval, Report, Results, token_rate

PLOT = Kind("benchmarks/peers.py --plot", starts_with(b"benchmarks/peers.py --plot"))
PLOT_TYPES = (".svg", ".png")
NOTHING = "–"
NGRAM = 4  # tokens


def tokens_per_step(report: Report) -> float:
    """Return the tokens that a step adds, over all prompts; 1 without speculation."""
    tokens, steps = (sum(prompt[name] for prompt in report["prompts"]) for name in ("tokens", "steps"))
    return float(tokens / steps)


def mean_of(name: str) -> Callable[[Report], float]:
    """Return the metric that is the mean of a number over prompts."""
    return lambda report: statistics.mean(float(prompt[name]) for prompt in report["prompts"])


def first_token_ms(length: int) -> Callable[[Report], float]:
    """Return the metric that is the median time in ms to the first token after a prompt of `length` tokens."""
    return lambda report: (
        1e3
        * statistics.median(
            float(one["prefill_seconds"]) for one in report["prefills"] if one["prompt_tokens"] == length
        )
    )


def memory_mb(name: str) -> Callable[[Report], float]:
    """Return the metric that is one kind of memory after the first answer, in MB; NaN where it was not measured."""
    return lambda report: float(report["memory_bytes"].get(name, float("nan"))) / 1e6


def repeated(report: Report) -> float:
    """Return the share of tokens of all answers that end four tokens which the same answer has had before."""
    answers = [prompt["answer"] for prompt in report["prompts"]]
    ngrams = [[tuple(answer[at : at + NGRAM]) for at in range(len(answer) - NGRAM + 1)] for answer in answers]
    return sum(len(one) - len(set(one)) for one in ngrams) / sum(map(len, answers))


def system_rows(results: Results, lengths: list[int], end_tokens: frozenset[int]) -> dict[str, list[str]]:
    """Return the columns of the first table: a heading and the cells of all contenders, sorted by class and speed."""
    names = [
        name
        for precision_class in (*CLASSES, EXTRA)
        for name in sorted(results.contenders, key=lambda name: -_median(results, name, token_rate))
        if results.contenders[name]["precision_class"] == precision_class
    ]

    def column(metric: Callable[[Report], float], digits: int = 0) -> list[str]:
        return [f"{_median(results, name, metric):.{digits}f}" for name in names]

    return {
        "system": names,
        "class": [str(results.contenders[name]["precision_class"]) for name in names],
        "rounds": [str(len(results.reports[name])) for name in names],
        "tokens/s": [_spread(results.per_round(name, token_rate)) for name in names],
        "tokens/step": [_steps(results, name) for name in names],
        "cores": column(mean_of("cores_used"), 2),
        **{f"first token {length}, ms": column(first_token_ms(length)) for length in lengths},
        "start, s": column(lambda report: float(report["start_seconds"]), 2),
        "RSS, MB": column(memory_mb("rss")),
        "anonymous": column(memory_mb("anonymous")),
        "file, MB": [f"{results.contenders[name]['model_bytes'] / 1e6:.0f}" for name in names],
        "repeated": [f"{_median(results, name, repeated):.0%}" for name in names],
        "other load": [f"{_median(results, name, mean_of('other_load')):.0%}" for name in names],
        "answers as own plain": [_equality(results, name, end_tokens) for name in names],
    }


def class_rows(results: Results, end_tokens: frozenset[int]) -> dict[str, list[str]]:
    """Return the columns of the second table: for each class our best plain decoding, the best peer and our best tree.

    Classes without both ours and a peer's are left out.
    """
    columns: dict[str, list[str]] = {}
    for precision_class in CLASSES:
        own, tree, peer, any_peer = (
            results.fastest(precision_class=precision_class, own=ours, speculates=speculates)
            for ours, speculates in ((True, False), (True, True), (False, False), (False, None))
        )
        if own is None or any_peer is None:
            continue
        row = {
            "class": precision_class,
            "own plain": own,
            "best peer, plain": peer or NOTHING,
            "own plain ÷ it": _ratio(results, own, peer),
            "best tree": tree or NOTHING,
            "tree ÷ own plain": _ratio(results, tree, own),
            "tree ÷ peer, plain": _ratio(results, tree, peer),
            "best peer": any_peer,
            "tree ÷ best peer": _ratio(results, tree, any_peer),
            "answers as plain": _equality(results, tree, end_tokens) if tree else NOTHING,
        }
        for heading, cell in row.items():
            columns.setdefault(heading, []).append(cell)
    return columns


def print_tables(results: Results, lengths: list[int], end_tokens: frozenset[int]) -> None:
    """Print what every system needs, and how ours compare with the best peers."""
    machine: Mapping[str, Any] = results.conditions["machine"]
    console.write(f"{machine['processor']}, {machine['physical_cores']} cores, {' '.join(machine['features'])}\n")
    systems, classes = system_rows(results, lengths, end_tokens), class_rows(results, end_tokens)
    console.write(_table(systems, text=("system", "class")) + "\n")
    if classes:
        names = ("class", "own plain", "best peer, plain", "best tree", "best peer")
        console.write(_table(classes, text=names))


def _table(columns: dict[str, list[str]], text: tuple[str, ...]) -> str:
    return console.table(list(columns), zip(*columns.values(), strict=True), text=text)


def _median(results: Results, name: str, metric: Callable[[Report], float]) -> float:
    return statistics.median(results.per_round(name, metric))


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def _steps(results: Results, name: str) -> str:
    """Return the tokens per step; genai hands out the tokens of a speculative step one by one."""
    steps = _median(results, name, tokens_per_step)
    return NOTHING if results.contenders[name]["speculates"] and steps == 1 else f"{steps:.2f}"


def _ratio(results: Results, ours: str | None, theirs: str | None) -> str:
    found: Interval | None = results.ratio(ours, theirs) if ours and theirs else None
    return f"{found.value:.3f} ({found.low:.3f}–{found.high:.3f})" if found else NOTHING


def _equality(results: Results, name: str, end_tokens: frozenset[int]) -> str:
    """Compare a tree with plain decoding of its build up to the last token, a peer with our plain decoding."""
    facts = results.contenders[name]
    reference = facts["plain"]
    if not facts["own"]:
        reference = results.fastest(precision_class=facts["precision_class"], own=True, speculates=False)
    if reference is None:
        return NOTHING
    found = results.equal_answers(name, reference, frozenset() if facts["own"] else end_tokens)
    if found is None:
        return NOTHING
    return f"{found.equal}/{found.answers}" + (
        "" if facts["own"] else f", {found.leading / found.tokens:.0%} of tokens"
    )


def plot(results: Results, file: Path) -> None:
    """Plot the tokens per second of every system: medians and ranges, with a panel for each class."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    facts = results.contenders
    panels_of = {one: [name for name in facts if facts[name]["precision_class"] == one] for one in CLASSES}
    panels_of = {one: names for one, names in panels_of.items() if names}
    figure = Figure(figsize=(4.2 * len(panels_of), 5.0), layout="constrained")
    panels = figure.subplots(1, len(panels_of), squeeze=False)[0]
    for panel, (precision_class, names) in zip(panels, panels_of.items(), strict=True):
        rates = [results.per_round(name, token_rate) for name in names]
        middle = [statistics.median(rate) for rate in rates]
        spread_of = [
            [value - min(rate) for value, rate in zip(middle, rates, strict=True)],
            [max(rate) - value for value, rate in zip(middle, rates, strict=True)],
        ]
        colours = ["tab:blue" if facts[name]["own"] else "tab:gray" for name in names]
        panel.barh(names, middle, xerr=spread_of, color=colours)
        panel.invert_yaxis()
        panel.set_title(precision_class)
        panel.set_xlabel("tokens per second")
    FigureCanvasAgg(figure)
    named = {"Creator": PLOT.maker, "Date": None} if file.suffix == ".svg" else {"Software": PLOT.maker}
    with atomic_write(file) as target:
        figure.savefig(target, format=file.suffix[1:], metadata=named)
