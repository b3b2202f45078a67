"""What the report says of one stage of a run."""

import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import DONE, is_done
from ra3_megatron.report.charts import WIDE, Line, line_chart, smooth
from ra3_megatron.report.environment import redact
from ra3_megatron.report.figures import Row, finite_series, flatten_numbers, format_bytes, last, leaves, series
from ra3_megatron.report.fp8_view import fp8_charts, fp8_figures
from ra3_megatron.report.progress import format_duration, format_rate
from ra3_megatron.report.rlvr_view import ShownGroup, is_rlvr, rlvr_charts, rlvr_figures, shown_groups
from ra3_megatron.report.schema import METRICS
from ra3_megatron.report.variational_view import variational_charts, variational_figures

_TRAINING = (("loss", "training", 0), ("code_loss", "training, code tokens", 4))
_VALIDATION = (
    ("validation_loss", "validation", 1),
    ("validation_code_loss", "validation, code given the thoughts", 2),
    ("bare_code_loss", "validation, code without thoughts", 3),
)


@dataclass(frozen=True)
class StageView:
    """What the report says of one stage, ready for the page."""

    name: str
    """Folder name, such as `02-midtrain`."""
    finished: bool
    """Whether it has its DONE."""
    many: bool
    """Whether there are many charts, to be shown three in a row."""
    figures: list[Row]
    """Headline figures: label and value."""
    charts: list[Markup]
    """SVG elements; the first is drawn over the full width."""
    validation: list[Row]
    """Step and validation loss, nats per token."""
    counts: list[tuple[str, list[Row]]]
    """Per report of a prepared corpus: its place in `data/` and rows of counts."""
    checkpoints: list[tuple[str, str, str]]
    """Name, size, state."""
    outcome: list[Row]
    """What DONE says."""
    groups: list[ShownGroup]
    """Answers of RLVR, for people."""


def stage_view(folder: Path, records: Sequence[dict[str, Any]], reward_unit: str) -> StageView:
    """The view of a stage from its folder and its metric records. Raises UserError for a damaged DONE.

    `reward_unit` is that of an E-step's reward.
    """
    result = _result(folder)
    figures, charts = _figures(records), _charts(records, folder.name)
    if estep := "-variational-" in folder.name:
        figures = variational_figures(records, result)
        charts = variational_charts(records, folder.name, reward_unit)
    if rlvr := is_rlvr(folder):
        figures, charts = rlvr_figures(records, result), rlvr_charts(records, folder.name)
    return StageView(
        name=folder.name,
        finished=is_done(folder),
        many=estep or rlvr,
        figures=figures + fp8_figures(records) + _common_figures(records),
        charts=charts + fp8_charts(records, folder.name),
        validation=[(str(s), f"{y:.4f}") for s, y in series(records, "validation_loss")],
        counts=[(name, rows) for name, content in _count_files(folder / "data") if (rows := flatten_numbers(content))],
        checkpoints=_checkpoints(folder / "checkpoints"),
        # Counts of a corpus have a table of their own, from the file beside the corpus.
        outcome=list(leaves({k: v for k, v in redact(result).items() if k != "counts"})),
        groups=shown_groups(folder) if rlvr else [],
    )


def _figures(records: Sequence[dict[str, Any]]) -> list[Row]:
    """Headline figures of supervised training, those that were measured."""
    rows: list[Row] = []
    if records:
        rows.append(("steps", f"{records[-1]['step']:,}"))
    if (tokens := last(records, "tokens")) is not None:
        rows.append(("tokens, padding included", f"{tokens:,.0f}"))
    if (loss := last(records, "loss")) is not None:
        rows.append(("training loss", f"{loss:.4f}"))
    # In text without thoughts the losses are one and the same, and said once.
    shown: list[list[tuple[int, float]]] = []
    for name, label in (
        ("validation_loss", "validation loss"),
        ("validation_code_loss", "code, given thoughts"),
        ("bare_code_loss", "code, no thoughts"),
    ):
        validation = series(records, name)
        if validation and validation not in shown:
            shown.append(validation)
            first, final = validation[0][1], validation[-1][1]
            rows.append((label, f"{final:.4f}" if len(validation) == 1 else f"{first:.4f} → {final:.4f}"))
            if name == "validation_loss" and math.isfinite(final) and final < 20:
                rows.append(("validation perplexity", f"{math.exp(final):.2f}"))
    if (skipped := last(records, "skipped_steps")) is not None and skipped > 0:
        rows.append(("skipped steps", f"{skipped:,.0f}"))
    return rows


def _common_figures(records: Sequence[dict[str, Any]]) -> list[Row]:
    """Speed, memory and time."""
    rows: list[Row] = []
    if speeds := [y for _, y in series(records, "tokens_per_second")]:
        rows.append(("median tokens/s", format_rate(statistics.median(speeds))))
    if (mfu := last(records, "mfu")) is not None:
        rows.append(("model FLOP utilisation", f"{mfu:.1%}"))
    if (memory := last(records, "peak_memory_bytes")) is not None:
        rows.append(("peak memory", format_bytes(memory)))
    times = [y for _, y in series(records, "time")]
    if len(times) > 1:
        # Gaps between attempts count in, which is what a person waiting for the run sees.
        rows.append(("first to last record", format_duration(times[-1] - times[0])))
    return rows


def _charts(records: Sequence[dict[str, Any]], stage: str) -> list[Markup]:
    """Losses over the full width, then what else was measured."""
    charts = []
    if lines := _loss_lines(records):
        charts.append(line_chart(lines, "Loss", METRICS["loss"].unit, WIDE, salt=stage))
    for name, title, unit, from_zero in (
        ("lr", "Learning rate", "", False),
        ("grad_norm", "Gradient norm", "", False),
        ("tokens_per_second", "Speed", METRICS["tokens_per_second"].unit, True),
        ("mfu", "Model FLOP utilisation", "", True),
    ):
        if points := finite_series(records, name):
            charts.append(line_chart([Line(title, points)], title, unit, salt=stage, from_zero=from_zero))
    return [Markup(chart) for chart in charts]


def _loss_lines(records: Sequence[dict[str, Any]]) -> list[Line]:
    """All losses of a stage: one unit, one chart. In text without thoughts some are the same, and drawn once."""
    lines: list[Line] = []
    drawn: list[list[tuple[int, float]]] = []
    for name, label, colour in (*_TRAINING, *_VALIDATION):
        points = finite_series(records, name)
        if not points or points in drawn:
            continue
        drawn.append(points)
        if (name, label, colour) in _VALIDATION:
            lines.append(Line(label, points, "marked", colour=colour))
        elif len(points) >= 50:
            # Drawn first, behind the others.
            lines.insert(0, Line(label, points, "faint", colour=colour))
            smoothed = smooth(points, max(5, len(points) // 40))
            lines.append(Line(f"{label}, smoothed", smoothed, colour=colour))
        else:
            lines.append(Line(label, points, colour=colour))
    return lines


def _checkpoints(folder: Path) -> list[tuple[str, str, str]]:
    """Name, size and state of every checkpoint folder, in order of the number in its name."""
    if not folder.is_dir():
        return []

    def number(path: Path) -> tuple[int, str]:
        digits = re.findall(r"\d+", path.name)
        return (int(digits[-1]) if digits else -1, path.name)

    rows = []
    # `latest` and the like are links; half-written folders start with a dot.
    for path in sorted((p for p in folder.iterdir() if p.is_dir() and not p.is_symlink()), key=number):
        if not path.name.startswith("."):
            size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
            rows.append((path.name, format_bytes(size), "complete" if is_done(path) else "unfinished"))
    return rows


def _result(folder: Path) -> dict[str, Any]:
    """The JSON object in DONE; empty for a bare DONE, or none."""
    text = (folder / DONE).read_text(encoding="utf-8").strip() if is_done(folder) else ""
    if not text.startswith("{"):
        return {}
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / DONE} is damaged ({error}); delete it and run again") from None


def _count_files(folder: Path) -> Iterator[tuple[str, Any]]:
    """The `report.json` files that preparation left in `folder`, with their place in it."""
    for path in sorted(folder.rglob("report.json")):
        place = path.relative_to(folder).parent
        yield str(place) if place.parts else "counts", json.loads(path.read_text(encoding="utf-8"))
