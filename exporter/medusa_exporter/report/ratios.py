"""What the page says first: ratios between plain decoding and trees, and between backends."""

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
    """A ratio: its median over cases, smallest and largest, and over how many."""

    middle: float
    least: float
    most: float
    cases: int


@dataclass(frozen=True)
class Headline:
    """One backend's best tree over its own plain decoding, and over the fastest plain decoding on its device.

    foreign: whether that fastest one was measured in another run in any of the cases.
    """

    series: Series
    tree: BenchResult
    speedup: Ratio
    over_best: Ratio | None
    foreign: bool


@dataclass(frozen=True)
class Pair:
    """Tokens a second of one backend over another's, by plain decoding and by each one's best tree."""

    above: Series
    below: Series
    plain: Ratio | None
    trees: Ratio | None
    same_run: bool
    same_device: bool


class ReportData:
    """All runs' cells together, and what follows from them."""

    def __init__(self, runs: Sequence[BenchRun]) -> None:
        """runs: one at least."""
        self.runs = {run.letter: run for run in runs}
        self.cells = [cell for run in runs for cell in run.cells]
        self.series = [*dict.fromkeys(cell.series for cell in self.cells)]
        self.cases = sorted({cell.case for cell in self.cells}, key=lambda case: (case[0] or 0, case[1]))
        self._device = {one: self.runs[one[0]].device(one[1]) for one in self.series}

    def label(self, series: Series) -> str:
        """How a backend is called: with its run's letter where there are several runs."""
        run, backend, precision = series
        return f"{run}: {backend} {precision}" if len(self.runs) > 1 else f"{backend} {precision}"

    def of(self, series: Series) -> list[BenchResult]:
        """One backend's cells."""
        return [cell for cell in self.cells if cell.series == series]

    def best_tree(self, series: Series) -> str | None:
        """The tree with the highest speed-up, by the median over cases; None where none has one."""
        found: dict[str, list[float]] = {}
        for cell in self.of(series):
            if not cell.is_plain and cell.speedup is not None:
                found.setdefault(cell.profile, []).append(cell.speedup)
        return max(found, key=lambda name: median(found[name]), default=None)

    def fastest_plain(self, cell: BenchResult) -> BenchResult | None:
        """The fastest plain decoding of a cell's case on its device, in whichever run."""
        rivals = [
            other
            for other in self.cells
            if other.is_plain and other.case == cell.case and self._device[other.series] == self._device[cell.series]
        ]
        return max((one for one in rivals if one.tokens_per_second), key=_rate, default=None)

    def over_best(self, cell: BenchResult) -> tuple[float, bool] | None:
        """Its tokens a second over the fastest plain decoding's, and whether that one is of another run."""
        best = self.fastest_plain(cell)
        if best is None or not cell.tokens_per_second:
            return None
        return cell.tokens_per_second / _rate(best), best.run != cell.run

    def headlines(self) -> list[Headline]:
        """One for each backend that has a tree with a speed-up."""
        found = []
        for series in self.series:
            name = self.best_tree(series)
            cells = [cell for cell in self.of(series) if cell.profile == name]
            own = _ratio(cell.speedup for cell in cells)
            if own is not None:
                over = [one for one in map(self.over_best, cells) if one is not None]
                best = _ratio(ratio for ratio, _ in over)
                found.append(Headline(series, cells[0], own, best, any(foreign for _, foreign in over)))
        return found

    def pairs(self) -> list[Pair]:
        """Every backend over the first one of the page, in the cases that both have."""
        first, *others = self.series
        return [
            Pair(
                other,
                first,
                self._between(other, first, trees=False),
                self._between(other, first, trees=True),
                other[0] == first[0],
                self._device[other] == self._device[first],
            )
            for other in others
            if {cell.case for cell in self.of(other)} & {cell.case for cell in self.of(first)}
        ]

    def chosen(self, series: Series, case: Case, *, tree: bool) -> BenchResult | None:
        """A backend's plain decoding in one case, or its best tree."""
        name = self.best_tree(series)
        for cell in self.of(series):
            if cell.case == case and (cell.profile == name if tree else cell.is_plain):
                return cell
        return None

    def _between(self, above: Series, below: Series, *, trees: bool) -> Ratio | None:
        ratios = []
        for case in self.cases:
            one, other = (self.chosen(series, case, tree=trees) for series in (above, below))
            if one is not None and other is not None and one.tokens_per_second and other.tokens_per_second:
                ratios.append(one.tokens_per_second / other.tokens_per_second)
        return _ratio(ratios)


def _rate(cell: BenchResult) -> float:
    return cell.tokens_per_second or 0.0


def _ratio(values: Iterable[float | None]) -> Ratio | None:
    present = [value for value in values if value is not None]
    return Ratio(median(present), min(present), max(present), len(present)) if present else None
