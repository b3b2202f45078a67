"""Line charts as small SVG texts that take their colours from the page, so they follow its light or dark theme."""

import html
import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

MAX_POINTS = 1500
"""Points of one line at most: more than a chart has pixels only makes the page heavy."""

# Stand-ins that no chart uses otherwise; they are replaced by CSS variables in the finished SVG.
_THEME = {
    "#0a0b01": "var(--ink)",
    "#0a0b02": "var(--grid)",
    "#0a0b03": "var(--line-1)",
    "#0a0b04": "var(--line-2)",
    "#0a0b05": "var(--line-3)",
}
_INK, _GRID, *_LINES = _THEME
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.edgecolor": _GRID,
    "grid.color": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    label: str
    """Name in the legend."""
    points: Sequence[tuple[float, float]]
    """(x, y) in order of x; points that are not finite leave gaps."""
    style: Literal["plain", "faint", "marked"] = "plain"
    """Drawn as a line, as a faint one behind the others, or as a line with a dot at every point."""


def thin(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` of `points`: of every run of neighbours the lowest and the highest stay, and the last point.

    Spikes survive, which an every-nth choice would lose.
    """
    if len(points) <= limit:
        return list(points)
    bins = (limit - 1) // 2
    kept: list[tuple[float, float]] = []
    edges = [round(i * len(points) / bins) for i in range(bins + 1)]
    for start, end in itertools.pairwise(edges):
        run = range(start, end)
        low, high = min(run, key=lambda i: points[i][1]), max(run, key=lambda i: points[i][1])
        kept += [points[i] for i in sorted({low, high})]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def smooth(points: Sequence[tuple[float, float]], span: int) -> list[tuple[float, float]]:
    """Exponential moving average over about `span` points, without bias at the start; not-finite values are skipped."""
    decay = 1 - 2 / (span + 1)
    total = weight = 0.0
    result = []
    for x, y in points:
        if not math.isfinite(y):
            continue
        total, weight = decay * total + y, decay * weight + 1
        result.append((x, total / weight))
    return result


def line_chart(
    lines: Sequence[Line],
    title: str,
    unit: str,
    size: tuple[float, float] = (5.2, 2.6),
    salt: str = "",
    from_zero: bool = False,
) -> str:
    """An `<svg>` element with `lines` over steps. `size` is in inches; the page scales it to its width.

    `salt` tells apart the element ids of charts with the same title on one page. An empty `unit` is left out;
    `from_zero` starts the y axis at 0. Same input, same text.
    """
    with matplotlib.rc_context(_SETTINGS | {"svg.hashsalt": salt + title}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        colours = itertools.cycle(_LINES)
        for line in lines:
            xs, ys = zip(*thin(line.points), strict=True)
            faint = line.style == "faint"
            axes.plot(
                xs,
                ys,
                # A faint line and the one drawn over it show the same thing, so they share a colour.
                color=_LINES[0] if faint else next(colours),
                alpha=0.3 if faint else 1.0,
                linewidth=1.0 if faint else 1.6,
                marker="o" if line.style == "marked" or len(xs) == 1 else None,
                markersize=3.5,
                label=line.label,
            )
        axes.set_title(f"{title} ({unit})" if unit else title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.grid(visible=True, linewidth=0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        highest = max((abs(y) for line in lines for _, y in line.points if math.isfinite(y)), default=0.0)
        if highest >= 1000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        if from_zero:
            axes.set_ylim(bottom=0)
        if len(lines) > 1:
            axes.legend(loc="best", fontsize=9)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), title)


def _for_page(svg: str, title: str) -> str:
    """The bare element: no XML head and no style of its own, colours from the page, a name for screen readers."""
    element = svg[svg.index("<svg ") :].strip()
    element = re.sub(r"<(metadata|style)\b.*?</\1>", "", element, flags=re.DOTALL)
    for stand_in, variable in _THEME.items():
        element = element.replace(stand_in, variable)
    return element.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
