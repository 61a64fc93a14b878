"""Turns matplotlib plots into SVG for the page: without scripts or fonts, in the page's light or dark colours."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from medusa_exporter.extras import import_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Placeholders: `as_svg` replaces each by a colour of the page.
TEXT, GRID, MUTED = "#010101", "#020202", "#030303"
SERIES = tuple(f"#04040{number}" for number in range(1, 7))
MARKERS = ("o", "s", "^", "D", "v", "P")
_IN_PAGE = {TEXT: "currentColor", GRID: "var(--grid)", MUTED: "var(--muted)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, start=1)
}
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may contain a dollar sign
    "font.size": 9.5,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "xtick.labelcolor": TEXT,
    "ytick.color": MUTED,
    "ytick.labelcolor": TEXT,
    "legend.frameon": False,
}


@contextmanager
def style() -> Iterator[Any]:
    """Set the style of the plots inside the block, and yield matplotlib; MissingExtraError if it is not installed."""
    matplotlib = import_extra("matplotlib", "export")
    with matplotlib.rc_context(_STYLE):
        yield matplotlib


def new_figure(width: float, height: float, panels: int = 1, **options: Any) -> tuple[Figure, list[Any]]:
    """Return a figure of `width` × `height` inches and its panels, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, **options)[0]
    return figure, [*axes]


def as_svg(figure: Figure, name: str) -> str:
    """Return the figure as an <svg> element, whose ids begin with `name` to be unique on the page."""
    import matplotlib

    target = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\b(id=")|(href="#)|(url\(#)', lambda found: f"{found[0]}{name}-", text)
    text = re.sub(
        r' (width|height)="[\d.]+pt"', "", text, count=2
    )  # the page sets the size; viewBox keeps the aspect ratio
    for colour, in_page in _IN_PAGE.items():
        text = text.replace(colour, in_page)
    return text.strip()
