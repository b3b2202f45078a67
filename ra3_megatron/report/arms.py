"""The arms of a run side by side: what was measured on held-out code, and how each learned."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ra3_megatron.config.errors import UserError
from ra3_megatron.report.charts import WIDE, Interval, Line, interval_chart, line_chart
from ra3_megatron.report.figures import interval, number, scaled
from ra3_megatron.report.progress import format_duration

MEASURED_FILE = "measured.json"
_TRAINED = re.compile(r"\d+-(?:(?P<arm>[a-z0-9_]+)-sft-(?P<round>\d+)|(?P<ntp>ntp)(?:-sft)?)")
_CE = "nats per token"

FORMS = {"bare": "no thoughts", "thinking": "own thoughts", "multi_sample": "own thoughts, multi-sample"}
"""How the loss on code tokens is measured, and how the page calls it."""
PAIRS = {**FORMS, "thinking_against_bare": "own thoughts − no thoughts"}
"""Differences between two arms: both measured alike, or one with thoughts and the other without."""


@dataclass(frozen=True)
class ArmsTable:
    """A table ready for the page."""

    head: tuple[str, ...]
    """Names of the columns; the first is text, the others numbers."""
    rows: list[tuple[str, ...]]
    """Cells."""


@dataclass(frozen=True)
class ArmsView:
    """What the report says of the arms."""

    table: ArmsTable | None
    """Figures on held-out code; None before they are measured."""
    paired: ArmsTable | None
    """Differences between arms on the same snippets."""
    notes: list[str]
    """What the figures are, in the words of the stage that measured them."""
    charts: list[Markup]
    """Charts over the full width."""


def arms_view(folders: Sequence[Path], records: dict[str, list[dict[str, Any]]]) -> ArmsView | None:
    """The arms of a run from its stage `folders` and their metric `records` by folder name; None with one arm alone.

    Raises UserError for a damaged file.
    """
    measured = _measured(folders)
    charts = [Markup(chart) for chart in (_held_out(measured), _learning(records, measured)) if chart]
    if not measured:
        return ArmsView(None, None, [], charts) if charts else None
    counts = [f"{measured[name]:,} {name}" for name in ("snippets", "documents") if name in measured]
    notes = [f"Held out: {', '.join(counts)}."] if counts else []
    notes += [str(measured["method"])] if measured.get("method") else []
    return ArmsView(_table(_rows(measured)), _paired(measured.get("paired") or {}), notes, charts)


def verdict(low: float | None, high: float | None, other: str) -> str:
    """What an interval of a difference in loss says, and no more."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return "not known"
    if low <= 0 <= high:
        return "no difference shown"
    return f"lower than {other}" if high < 0 else f"higher than {other}"


def p_text(value: float | None) -> str:
    """A p-value with as many figures as it deserves."""
    return "< 0.001" if value is not None and value < 0.001 else number(value, ".3f")


# -------------------------------------------------------------------------------------------------- measurements


def _measured(folders: Sequence[Path]) -> dict[str, Any]:
    """Content of the last `measured.json`; empty when there is none."""
    paths = [path for folder in folders for path in (folder / MEASURED_FILE, folder / "data" / MEASURED_FILE)]
    found = [path for path in paths if path.is_file()]
    if not found:
        return {}
    content = read_object(found[-1])
    if not isinstance(content.get("arms"), dict):
        raise UserError(f"{found[-1]} has no object 'arms'; remove it and its stage's DONE, and run again")
    return content


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and make it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object; remove it and make it again")
    return content


def _rows(measured: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name and figures of the base model and of every arm."""
    base = measured.get("base")
    return ([("base", base)] if base else []) + list(measured["arms"].items())


def _table(rows: list[tuple[str, dict[str, Any]]]) -> ArmsTable:
    """One row per arm; a way of measuring that no arm has is left out."""
    forms = [form for form in FORMS if any(figures.get(form) for _, figures in rows)]
    head = ("arm", *(FORMS[form] for form in forms), "think rate", "gain of a thought")
    cells = [
        (
            name,
            *(_interval_of(figures.get(form)) for form in forms),
            number(figures.get("think_rate"), ".1%"),
            interval(figures.get("gain"), figures.get("gain_low"), figures.get("gain_high"), "+.3f"),
            scaled(figures.get("raw_tokens"), ""),
            scaled(figures.get("flops"), "FLOP"),
            format_duration(figures["seconds"]) if figures.get("seconds") is not None else "–",
        )
        for name, figures in rows
    ]
    return ArmsTable((*head, "raw code tokens", "compute", "time"), cells)


def _interval_of(figure: dict[str, Any] | None) -> str:
    figure = figure or {}
    return interval(figure.get("nats_per_token"), figure.get("low"), figure.get("high"))


def _paired(paired: dict[str, dict[str, Any]]) -> ArmsTable | None:
    """Differences on the same snippets, with what their intervals say."""
    cells: list[tuple[str, ...]] = []
    for arm, forms in paired.items():
        for form, entry in forms.items():
            low, high, other = entry.get("low"), entry.get("high"), str(entry["against"])
            difference = interval(entry["difference"], low, high, "+.4f")
            what = verdict(low, high, other)
            cells.append((f"{arm} − {other}", PAIRS.get(form, form), difference, p_text(entry.get("p_value")), what))
    return ArmsTable(("arms", "code tokens", "difference", "p", "what it shows"), cells) if cells else None


def _held_out(measured: dict[str, Any]) -> str | None:
    """Losses of all arms with their intervals, with and without thoughts."""
    rows = []
    for name, figures in _rows(measured) if measured else []:
        for colour, (key, label) in enumerate((("bare", name), ("thinking", f"{name}, {FORMS['thinking']}"))):
            figure = figures.get(key) or {}
            value = figure.get("nats_per_token")
            if value is not None and math.isfinite(value):
                low, high = (math.nan if figure.get(end) is None else figure[end] for end in ("low", "high"))
                rows.append(Interval(label, value, low, high, colour))
    return interval_chart(rows, "Cross-entropy on held-out code tokens", _CE, WIDE[0]) if len(rows) > 1 else None


# -------------------------------------------------------------------------------------------------- learning curves


def _learning(records: dict[str, list[dict[str, Any]]], measured: dict[str, Any]) -> str | None:
    """Loss on bare code of all arms over the raw code tokens seen, or over passes while their number is not known."""
    curves = _curves(records)
    if len(curves) < 2:
        return None
    totals = {arm: (measured.get("arms", {}).get(arm) or {}).get("raw_tokens") or 0 for arm in curves}
    known = all(totals[arm] and curves[arm][-1][0] for arm in curves)
    lines = []
    for arm, points in curves.items():
        scale = totals[arm] / points[-1][0] if known else 1.0
        lines.append(Line(arm, [(x * scale, y) for x, y in points], "marked"))
    label = "raw code tokens seen" if known else "passes over the corpus"
    title = "Loss on validation code without thoughts, by arm"
    return line_chart(lines, title, _CE, WIDE, x_label=label)


def _curves(records: dict[str, list[dict[str, Any]]]) -> dict[str, list[tuple[float, float]]]:
    """(passes over the corpus so far, loss on bare code) of every arm, its rounds one after the other."""
    rounds: dict[str, list[tuple[int, str]]] = {}
    for name in records:
        if match := _TRAINED.fullmatch(name):
            arm = match["ntp"] or match["arm"]
            rounds.setdefault(arm, []).append((int(match["round"] or 1), name))
    curves = {}
    for arm, stages in rounds.items():
        points: list[tuple[float, float]] = []
        before = 0.0
        for _, name in sorted(stages):
            metric = _bare_metric(records[name], plain_text=arm == "ntp")
            passes = 0.0
            for record in records[name]:
                passes = record.get("epoch", passes)
                if metric in record:
                    points.append((before + passes, record[metric]))
            before += passes
        if len(points) > 1:
            curves[arm] = points
    return curves


def _bare_metric(records: list[dict[str, Any]], plain_text: bool) -> str:
    """Name of the loss on code without thoughts: where the text has none, the validation loss is that loss."""
    names = ["bare_code_loss", *(["validation_code_loss", "validation_loss"] if plain_text else [])]
    return next((name for name in names if any(name in record for record in records)), "bare_code_loss")
