"""Charts as small SVG texts that take their colours from the page, so they follow its light or dark theme."""

import html
import io
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

WIDE = (10.6, 3.4)
"""Size of a chart over the full width of the page, inches."""
HALF = (5.2, 2.6)
"""Size of one of two charts in a row, inches."""
SMALL = (4.1, 2.4)
"""Size of one of three charts in a row, inches: the page shows all charts at about the same size of letters."""
POINTS_PER_INCH = 150
"""Points of one line at most, per inch of the chart: more than a screen has pixels only makes the page heavy."""

# Stand-ins that no chart uses otherwise; they are replaced by CSS variables in the finished SVG.
_THEME = {
    "#0a0b01": "var(--ink)",
    "#0a0b02": "var(--grid)",
    "#0a0b03": "var(--line-1)",
    "#0a0b04": "var(--line-2)",
    "#0a0b05": "var(--line-3)",
    "#0a0b06": "var(--line-4)",
    "#0a0b07": "var(--line-5)",
    "#0a0b08": "var(--line-6)",
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
    style: Literal["plain", "faint", "marked", "dashed"] = "plain"
    """Drawn as a line, as a faint one behind the others, as a line with a dot at every point, or dashed."""
    errors: Sequence[float] | None = None
    """Half width of the band around each point, in the unit of y; None = no band."""
    colour: int | None = None
    """Number of the colour, from 0; None = the next one."""


@dataclass(frozen=True)
class Interval:
    """One row of an interval chart: a dot with a bar."""

    label: str
    """Name at the left."""
    value: float
    """Where the dot is."""
    low: float
    """Lower end of the bar; NaN = no bar."""
    high: float
    """Upper end of the bar; NaN = no bar."""
    colour: int = 0
    """Number of the colour, from 0."""


@dataclass(frozen=True)
class Bar:
    """One row of a chart of bars: parts that lie one after another."""

    label: str
    """Name at the left."""
    parts: dict[str, float]
    """Length of each part, by its name in the legend; the first row's order is that of all."""


def thin(points: Sequence[tuple[float, float]], limit: int) -> list[int]:
    """Indices of at most `limit` of `points`: of every run of neighbours the lowest and the highest, and the last.

    Spikes survive, which an every-nth choice would lose.
    """
    if len(points) <= limit:
        return list(range(len(points)))
    bins = (limit - 1) // 2
    kept: list[int] = []
    edges = [round(i * len(points) / bins) for i in range(bins + 1)]
    for start, end in itertools.pairwise(edges):
        run = range(start, end)
        low, high = min(run, key=lambda i: points[i][1]), max(run, key=lambda i: points[i][1])
        kept += sorted({low, high})
    return kept if kept[-1] == len(points) - 1 else [*kept, len(points) - 1]


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
    size: tuple[float, float] = HALF,
    salt: str = "",
    from_zero: bool = False,
    x_label: str = "step",
    x_log: bool = False,
) -> str:
    """An `<svg>` element with `lines` over `x_label`. `size` is in inches; the page scales it to its width.

    `salt` tells apart the element ids of charts with the same title on one page. An empty `unit` is left out;
    `from_zero` starts the y axis at 0; `x_log` spaces x by its logarithm. Same input, same text.
    """
    svg = _Svg()
    with _figure(title, unit, size, salt, svg) as axes:
        colours = itertools.cycle(range(len(_LINES)))
        for line in lines:
            # A faint line and the one drawn over it show the same thing, so they share a colour.
            colour = line.colour if line.colour is not None else 0 if line.style == "faint" else next(colours)
            _draw(axes, line, _LINES[colour % len(_LINES)], round(POINTS_PER_INCH * size[0]))
        axes.set_xlabel(x_label)
        if x_log:
            axes.set_xscale("log")
            # Its ticks are the points themselves: a sweep has few.
            values = sorted({x for line in lines for x, _ in line.points})
            axes.set_xticks(values, [f"{x:g}" for x in values])
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            _tick_x(axes, lines)
        highest = max((abs(y) for line in lines for _, y in line.points if math.isfinite(y)), default=0.0)
        if highest >= 1000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        if from_zero:
            axes.set_ylim(0, 1.08 * highest if highest else 1)
        if sum(line.style != "faint" for line in lines) > 1:
            _legend(axes, inside=size[0] > HALF[0])
    return svg.text


def stacked_chart(
    layers: Sequence[Line], title: str, unit: str, size: tuple[float, float] = HALF, salt: str = ""
) -> str:
    """An `<svg>` element with areas on top of each other over steps; the layers share their x values.

    Raises ValueError when they do not.
    """
    xs = [x for x, _ in layers[0].points]
    if any([x for x, _ in layer.points] != xs for layer in layers):
        raise ValueError("the layers of a stacked chart have different x values")
    svg = _Svg()
    with _figure(title, unit, size, salt, svg) as axes:
        colours = [_LINES[i % len(_LINES)] for i in range(len(layers))]
        totals = [(x, sum(layer.points[i][1] for layer in layers)) for i, x in enumerate(xs)]
        kept = thin(totals, round(POINTS_PER_INCH * size[0]))
        heights = [[layer.points[i][1] for i in kept] for layer in layers]
        labels = [layer.label for layer in layers]
        axes.stackplot([xs[i] for i in kept], heights, labels=labels, colors=colours, alpha=0.75, linewidth=0)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        _tick_x(axes, layers)
        _legend(axes, inside=False)
    return svg.text


def interval_chart(
    rows: Sequence[Interval],
    title: str,
    unit: str,
    width: float = 5.2,
    salt: str = "",
    mark: float | None = None,
) -> str:
    """An `<svg>` element with a dot and a bar per row, the first row on top; a vertical line at `mark`.

    `width` is in inches; the height follows the number of rows.
    """
    svg = _Svg()
    with _figure(title, unit, (width, 0.9 + 0.27 * len(rows)), salt, svg) as axes:
        if mark is not None:
            axes.axvline(mark, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
        for place, row in enumerate(rows):
            colour = _LINES[row.colour % len(_LINES)]
            if math.isfinite(row.low) and math.isfinite(row.high):
                axes.plot((row.low, row.high), (place, place), color=colour, linewidth=2.2, solid_capstyle="butt")
            axes.plot([row.value], [place], color=colour, marker="o", markersize=5)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.margins(x=0.08)
    return svg.text


def bar_chart(rows: Sequence[Bar], title: str, unit: str, width: float = WIDE[0], salt: str = "") -> str:
    """An `<svg>` element with a bar per row, the first row on top, cut into parts; parts of one name share a colour.

    `width` is in inches; the height follows the number of rows.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.parts))
    svg = _Svg()
    with _figure(title, unit, (width, 1.1 + 0.32 * len(rows)), salt, svg) as axes:
        left = [0.0] * len(rows)
        for number, name in enumerate(names):
            values = [row.parts.get(name, 0.0) for row in rows]
            # There are fewer colours than there may be parts: the second time round they are striped.
            stripes = "////" if number >= len(_LINES) else None
            colour = _LINES[number % len(_LINES)]
            axes.barh(range(len(rows)), values, left=left, color=colour, alpha=0.75, label=name, hatch=stripes)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8))
        _legend(axes, inside=False)
    return svg.text


@dataclass
class _Svg:
    """Where a finished chart is put."""

    text: str = ""


@contextmanager
def _figure(title: str, unit: str, size: tuple[float, float], salt: str, svg: _Svg) -> Iterator[Axes]:
    """Axes with title and grid to draw on; the element is in `svg` when the block ends."""
    with matplotlib.rc_context(_SETTINGS | {"svg.hashsalt": salt + title}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        # A label of the user's, such as the name of an arm, is no formula, whatever dollar signs it has.
        axes.set_title(f"{title} ({unit})" if unit else title, loc="left", fontsize=10, parse_math=False)
        axes.grid(visible=True, linewidth=0.5)
        yield axes
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg.text = _for_page(buffer.getvalue(), title)


def _draw(axes: Axes, line: Line, colour: str, limit: int) -> None:
    kept = thin(line.points, limit)
    xs, ys = [line.points[i][0] for i in kept], [line.points[i][1] for i in kept]
    faint = line.style == "faint"
    if line.errors is not None:
        errors = [line.errors[i] for i in kept]
        low, high = [y - e for y, e in zip(ys, errors, strict=True)], [y + e for y, e in zip(ys, errors, strict=True)]
        if len(xs) == 1:
            axes.vlines(xs, low, high, color=colour)  # a band of no width is not seen
        axes.fill_between(xs, low, high, color=colour, alpha=0.22, linewidth=0)
    axes.plot(
        xs,
        ys,
        color=colour,
        alpha=0.3 if faint else 1.0,
        linewidth=1.0 if faint else 1.6,
        linestyle=(0, (4, 2)) if line.style == "dashed" else "-",
        marker="o" if line.style == "marked" or len(xs) == 1 else None,
        markersize=3.5,
        # A faint line is explained by the one drawn over it.
        label=None if faint else line.label,
    )


def _legend(axes: Axes, inside: bool) -> None:
    """Names of the lines: in a large chart where there is room, else below it."""
    if inside:
        axes.legend(loc="best", fontsize=9)
        return
    handles, labels = axes.get_legend_handles_labels()
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, handlelength=1.2, columnspacing=1.0)


def _tick_x(axes: Axes, lines: Sequence[Line]) -> None:
    """Whole numbers at the ticks of x where the values are whole; `12k` for large ones."""
    whole = all(float(x).is_integer() for line in lines for x, _ in line.points)
    axes.xaxis.set_major_locator(MaxNLocator(integer=whole, nbins=6))
    if max((abs(x) for line in lines for x, _ in line.points), default=0) >= 10_000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _for_page(svg: str, title: str) -> str:
    """The bare element: no XML head and no style of its own, colours from the page, a name for screen readers."""
    element = svg[svg.index("<svg ") :].strip()
    element = re.sub(r"<(metadata|style)\b.*?</\1>", "", element, flags=re.DOTALL)
    for stand_in, variable in _THEME.items():
        element = element.replace(stand_in, variable)
    return element.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
