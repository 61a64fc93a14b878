"""Computes the ratios that a report shows first: trees over plain decoding, and one backend over another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from medusa_exporter.bench.results import Case
from medusa_exporter.report.results import BenchResult
from medusa_exporter.report.runs import BenchRun

Series = tuple[str, str, str]  # run, backend, precision


@dataclass(frozen=True)
class Ratio:
    """The median of a ratio over cases, its smallest and largest value, and the number of cases."""

    median: float
    smallest: float
    largest: float
    cases: int


@dataclass(frozen=True)
class BestTree:
    """The best tree of one backend.

    Attributes:
        series: Run, backend and precision.
        tree: A result with that tree.
        speedup: Speed-up over the backend's own plain decoding.
        over_best_plain: Speed-up over the fastest plain decoding on the same device.
        across_runs: Whether that fastest plain decoding was measured in another run, in any of the cases.
    """

    series: Series
    tree: BenchResult
    speedup: Ratio
    over_best_plain: Ratio | None
    across_runs: bool


@dataclass(frozen=True)
class BackendRatio:
    """The tokens per second of one backend over those of the first one, with plain decoding and with each best tree."""

    backend: Series
    first: Series
    plain: Ratio | None
    trees: Ratio | None
    same_run: bool
    same_device: bool


class ReportData:
    """The results of all runs, and what follows from them together."""

    def __init__(self, runs: Sequence[BenchRun]) -> None:
        """Collect the results of at least one run."""
        self.runs = {run.letter: run for run in runs}
        self.results = [result for run in runs for result in run.results]
        self.series = [*dict.fromkeys(result.series for result in self.results)]
        self.cases = sorted({result.case for result in self.results}, key=lambda case: (case[0] or 0, case[1]))
        self._device = {one: self.runs[one[0]].device(one[1]) for one in self.series}

    def label(self, series: Series) -> str:
        """Return the name of a backend, with the letter of its run where there are several runs."""
        run, backend, precision = series
        return f"{run}: {backend} {precision}" if len(self.runs) > 1 else f"{backend} {precision}"

    def results_of(self, series: Series) -> list[BenchResult]:
        """Return the results of one backend."""
        return [result for result in self.results if result.series == series]

    def best_tree(self, series: Series) -> str | None:
        """Return the tree with the highest speed-up, by the median over cases; None where no tree has one."""
        found: dict[str, list[float]] = {}
        for result in self.results_of(series):
            if not result.is_plain and result.speedup is not None:
                found.setdefault(result.profile, []).append(result.speedup)
        return max(found, key=lambda name: median(found[name]), default=None)

    def fastest_plain(self, result: BenchResult) -> BenchResult | None:
        """Return the fastest plain decoding with the same case and device, of any run."""
        device = self._device[result.series]
        found = [
            other
            for other in self.results
            if other.is_plain and other.case == result.case and self._device[other.series] == device
        ]
        return max((one for one in found if one.tokens_per_second), key=_rate, default=None)

    def over_best_plain(self, result: BenchResult) -> tuple[float, bool] | None:
        """Return the tokens per second over the fastest plain decoding's, and whether that is of another run."""
        best = self.fastest_plain(result)
        if best is None or not result.tokens_per_second:
            return None
        return result.tokens_per_second / _rate(best), best.run != result.run

    def best_trees(self) -> list[BestTree]:
        """Return the best tree of each backend; a backend without a speed-up is left out."""
        found = []
        for series in self.series:
            name = self.best_tree(series)
            results = [result for result in self.results_of(series) if result.profile == name]
            speedup = _ratio(result.speedup for result in results)
            if speedup is not None:
                over = [one for one in map(self.over_best_plain, results) if one is not None]
                best = _ratio(ratio for ratio, _ in over)
                found.append(BestTree(series, results[0], speedup, best, any(other_run for _, other_run in over)))
        return found

    def backend_ratios(self) -> list[BackendRatio]:
        """Compare each backend with the first one, in the cases that both have."""
        first, *others = self.series
        return [
            BackendRatio(
                other,
                first,
                self._between(other, first, trees=False),
                self._between(other, first, trees=True),
                other[0] == first[0],
                self._device[other] == self._device[first],
            )
            for other in others
            if {one.case for one in self.results_of(other)} & {one.case for one in self.results_of(first)}
        ]

    def find(self, series: Series, case: Case, *, tree: bool) -> BenchResult | None:
        """Return the result of a backend's plain decoding, or of its best tree, in one case."""
        name = self.best_tree(series)
        for result in self.results_of(series):
            if result.case == case and (result.profile == name if tree else result.is_plain):
                return result
        return None

    def _between(self, series: Series, first: Series, *, trees: bool) -> Ratio | None:
        ratios = []
        for case in self.cases:
            one, other = (self.find(of, case, tree=trees) for of in (series, first))
            if one is not None and other is not None and one.tokens_per_second and other.tokens_per_second:
                ratios.append(one.tokens_per_second / other.tokens_per_second)
        return _ratio(ratios)


def _rate(result: BenchResult) -> float:
    return result.tokens_per_second or 0.0


def _ratio(values: Iterable[float | None]) -> Ratio | None:
    present = [value for value in values if value is not None]
    return Ratio(median(present), min(present), max(present), len(present)) if present else None
