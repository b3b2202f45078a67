"""`compare.html`: arms over several seeds, with intervals over seeds and paired tests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ra3_megatron.config.errors import UserError
from ra3_megatron.report.arms import FORMS, PAIRS, ArmsTable, p_text, read_object, verdict
from ra3_megatron.report.charts import HALF, WIDE, Interval, Line, interval_chart, line_chart
from ra3_megatron.report.figures import interval, number, scaled
from ra3_megatron.report.page import write_page
from ra3_megatron.report.progress import format_duration

COMPARE_FILE = "compare.json"
COMPARE_PAGE = "compare.html"

_NAMES = {
    **PAIRS,
    "flops": "compute",
    "raw_tokens": "raw code tokens",
    "think_rate": "think rate",
    "thought_tokens": "tokens of a thought",
    "duration": "τ, lines",
    "discount_of_duration": "γ\N{COMBINING MACRON}",
    "gain": "gain, nats/token",
    "seconds": "time",
}
_DRAWN = ("bare", "thinking")
"""Losses in the chart."""
_COSTS = (*FORMS, "raw_tokens", "flops", "seconds")
"""What the first table shows; a second one has the rest."""
_TOTALS = ("raw_tokens", "flops", "seconds")
"""Figures that come without an interval: they are set, not found."""


@dataclass(frozen=True)
class ComparisonView:
    """What a page says of a comparison over seeds."""

    arms: list[str]
    """Arms compared."""
    seeds: list[str]
    """Seeds of the runs."""
    over: str
    """What the intervals are over: seeds, or documents where there is one seed."""
    summary: list[ArmsTable]
    """Means and their intervals, an arm a row, a metric a column: losses and costs, then how the arms think."""
    paired: ArmsTable | None
    """Differences between arms on the same seeds and snippets."""
    rows: ArmsTable
    """Every run."""
    notes: list[str]
    """What the figures are, in the words of the command that made them."""
    charts: list[Markup]
    """Intervals over seeds, and the sweep of the price of a thought where it was made."""


def comparison_view(path: Path) -> ComparisonView:
    """The view of a `compare.json`. Raises UserError for a file that is none."""
    content = read_object(path)
    missing = [name for name in ("arms", "seeds", "rows", "summary") if not isinstance(content.get(name), list)]
    if missing:
        raise UserError(f"{path} has no list {', '.join(missing)}; make it again with ra3 compare")
    return ComparisonView(
        arms=[str(arm) for arm in content["arms"]],
        seeds=[str(seed) for seed in content["seeds"]],
        over=str(content.get("interval_over", "seeds")),
        summary=[table for kind in (True, False) if (table := _summary(content["arms"], content["summary"], kind))],
        paired=_paired(content.get("paired") or []),
        rows=_rows(content["rows"]),
        notes=[str(content["method"])] if content.get("method") else [],
        charts=[Markup(c) for c in (*_intervals(content["summary"]), *_sweep(content.get("think_penalty") or []))],
    )


def build_compare_report(path: Path | str) -> Path:
    """Write `compare.html` beside a `compare.json` and return its path. Raises UserError for a file that is none."""
    path = Path(path)
    return write_page(
        path.parent / COMPARE_PAGE, "compare.html.j2", title=path.resolve().parent.name, compared=comparison_view(path)
    )


def _summary(arms: Sequence[str], entries: Sequence[dict[str, Any]], costs: bool) -> ArmsTable | None:
    """The table of losses and costs, or that of the other figures; None without any."""
    metrics = [m for m in dict.fromkeys(entry["metric"] for entry in entries) if (m in _COSTS) == costs]
    cells = {(entry["arm"], entry["metric"]): entry for entry in entries}
    counts = {arm: max((e.get("n") or 0 for e in entries if e["arm"] == arm), default=0) for arm in arms}
    rows = [
        (arm, *(_mean(metric, cells.get((arm, metric))) for metric in metrics), f"{counts[arm]}")
        for arm in arms
        if any((arm, metric) in cells for metric in metrics)
    ]
    return ArmsTable(("arm", *(_name(metric) for metric in metrics), "seeds"), rows) if rows else None


def _mean(metric: str, entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "–"
    if metric in _TOTALS:
        return _value(metric, entry["mean"])
    return interval(entry["mean"], entry.get("low"), entry.get("high"), ".3f" if metric == "think_rate" else ".4f")


def _paired(entries: Sequence[dict[str, Any]]) -> ArmsTable | None:
    """Differences in loss with what their intervals say."""
    if not entries:
        return None
    rows: list[tuple[str, ...]] = []
    for entry in entries:
        low, high, other = entry.get("low"), entry.get("high"), str(entry["against"])
        pair = f"{entry['arm']} − {other}"
        difference = interval(entry["difference"], low, high, "+.4f")
        says = verdict(low, high, other)
        rows.append((pair, _name(entry["metric"]), difference, p_text(entry.get("p_value")), says))
    return ArmsTable(("arms", "figure", "difference", "p", "what it shows"), rows)


def _rows(entries: Sequence[dict[str, Any]]) -> ArmsTable:
    metrics = [k for k in dict.fromkeys(k for entry in entries for k in entry) if k not in ("arm", "seed")]
    # A run's loss may come as the figure alone or with its interval over snippets.
    cells = [
        (str(entry["arm"]), str(entry["seed"]), *(_value(metric, entry.get(metric)) for metric in metrics))
        for entry in entries
    ]
    return ArmsTable(("arm", "seed", *(_name(metric) for metric in metrics)), cells)


def _value(metric: str, value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("nats_per_token")
    if value is None or isinstance(value, str):
        return value or "–"
    if metric == "flops":
        return scaled(value, "FLOP")
    if metric == "raw_tokens":
        return scaled(value, "")
    if metric == "seconds":
        return format_duration(value)
    return number(float(value), ".1%" if metric == "think_rate" else ".4f")


def _name(metric: str) -> str:
    return _NAMES.get(metric, metric.replace("_", " "))


def _intervals(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Means over seeds of the losses, with their intervals."""
    rows = [
        Interval(
            entry["arm"] if metric == "bare" else f"{entry['arm']}, {FORMS[metric]}",
            entry["mean"],
            math.nan if entry.get("low") is None else entry["low"],
            math.nan if entry.get("high") is None else entry["high"],
            colour,
        )
        for arm in dict.fromkeys(entry["arm"] for entry in entries)
        for colour, metric in enumerate(_DRAWN)
        for entry in entries
        if (entry["arm"], entry["metric"]) == (arm, metric) and entry["mean"] is not None
    ]
    if not rows:
        return []
    return [interval_chart(rows, "Cross-entropy on held-out code tokens", "nats per token", WIDE[0], "compare")]


def _sweep(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Think rate and reward over the price of a thought."""
    ordered = sorted(entries, key=lambda entry: entry["price"])
    charts = []
    for name, title, unit in (
        ("think_rate", "Think rate by price of a thought", "fraction"),
        ("reward", "Reward by price of a thought", "nats per token"),
    ):
        points = [(entry["price"], entry[name]) for entry in ordered if entry.get(name) is not None]
        if points:
            line = Line(title, points, "marked")
            zero, x_label, logarithmic = name == "think_rate", "price c of a thought", min(points)[0] > 0
            charts.append(line_chart([line], title, unit, HALF, "sweep", zero, x_label, logarithmic))
    return charts
