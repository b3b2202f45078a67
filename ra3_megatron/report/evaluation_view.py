"""The evaluation on benchmarks as a page shows it: a table, a picture, differences, failed answers."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from ra3_megatron.config.errors import UserError
from ra3_megatron.report.arms import ArmsTable, p_text, read_object, verdict
from ra3_megatron.report.charts import WIDE, Interval, Line, interval_chart, line_chart
from ra3_megatron.report.figures import Row, interval, number
from ra3_megatron.report.page import write_page

RESULTS_FILE = "results.json"
FAILURES_FILE = "failures.json"


@dataclass(frozen=True)
class FailureGroup:
    """Failed answers of one model on one benchmark."""

    title: str
    """Model and benchmark."""
    failures: list[dict[str, Any]]
    """Task, prompt, program, outcome, message, tests passed and there, notes."""
    failed: int
    """Failed answers in all; the page shows some."""


@dataclass(frozen=True)
class EvaluationView:
    """What a page says of an evaluation."""

    mode: str
    """`strict` or `parity`."""
    settings: list[Row]
    """How answers were drawn."""
    table: ArmsTable
    """A row per model and benchmark."""
    buckets: ArmsTable | None
    """Rates by rating or difficulty; None without any."""
    paired: ArmsTable | None
    """Differences to the first model; None with one model."""
    outcomes: ArmsTable
    """How the programs ended."""
    charts: list[Markup]
    """SVG elements."""
    groups: list[FailureGroup]
    """Failed answers for people."""
    sets: list[Row]
    """Where the problems came from."""
    notes: list[str]
    """What the figures are, and what they are not."""


def evaluation_view(folder: Path) -> EvaluationView | None:
    """The view of the evaluation in a stage's folder; None when it holds none. Raises UserError for damaged files."""
    path = folder / RESULTS_FILE
    if not path.is_file():
        return None
    results = read_object(path)
    try:
        return _view(results, _failures(folder / FAILURES_FILE))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} lacks a field ({error}); remove it and its stage's DONE, and run again") from None


def _failures(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and its stage's DONE, and run again") from None


def _view(results: Mapping[str, Any], failed: Sequence[dict[str, Any]]) -> EvaluationView:
    models = results["models"]
    settings = [(k.replace("_", " "), str(v)) for k, v in results["settings"].items() if v is not None]
    sets = [(name, _set(entry)) for name, entry in results["sets"].items()]
    charts = [_rates_chart(models), *_rating_charts(models)]
    return EvaluationView(
        mode=results["mode"],
        settings=settings,
        table=_table(models),
        buckets=_buckets(models),
        paired=_paired(results["paired"]),
        outcomes=_outcomes(models),
        charts=[Markup(chart) for chart in charts if chart],
        groups=_groups(models, failed),
        sets=sets,
        notes=[results["method"], results["contamination"]],
    )


def _set(entry: Mapping[str, Any]) -> str:
    dropped = "".join(f", {count} left out: {reason}" for reason, count in entry["dropped"].items())
    return f"{entry['problems']:,} problems from {Path(entry['source']).name}{dropped}"


def _each(models: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Model, benchmark, figures; the models of a benchmark one below the other."""
    names = list(dict.fromkeys(b for model in models.values() for b in model["benchmarks"]))
    return [(m, b, models[m]["benchmarks"][b]) for b in names for m in models if b in models[m]["benchmarks"]]


def _percent(rate: Mapping[str, Any] | None) -> str:
    if rate is None or rate["value"] is None:
        return "–"
    return _interval(rate["value"], rate, ".1f")


def _interval(value: float, ends: Mapping[str, Any], form: str) -> str:
    low, high = (None if ends[end] is None else 100 * ends[end] for end in ("low", "high"))
    return interval(100 * value, low, high, form)


def _table(models: Mapping[str, Any]) -> ArmsTable:
    every = _each(models)
    ks = sorted({int(k) for _, _, f in every for k in f["pass_at"]})
    head = ("benchmark, model", *(f"pass@{k}, %" for k in ks), "visible tests, %", "hidden tests, %", "problems")
    rows = []
    for model, benchmark, f in every:
        lost = f" ({f['lost']} answers without a verdict)" if f["lost"] else ""
        cells = [_percent(f["pass_at"].get(str(k))) for k in ks]
        share = "–" if f["cut_off"] is None else number(100 * f["cut_off"], ".1f")
        rest = (_percent(f["visible"]), _percent(f["hidden"]), f"{f['problems']}{lost}", share)
        rows.append((f"{benchmark}, {model}", *cells, *rest))
    return ArmsTable((*head, "cut off, %"), rows)


def _buckets(models: Mapping[str, Any]) -> ArmsTable | None:
    rows: list[tuple[str, ...]] = [
        (f"{benchmark}, {model}", bucket, _percent(rate))
        for model, benchmark, f in _each(models)
        for kind in ("ratings", "difficulties")
        for bucket, rate in f.get(kind, {}).items()
    ]
    return ArmsTable(("benchmark, model", "rating or difficulty", "pass@1, %"), rows) if rows else None


def _paired(paired: Mapping[str, Any]) -> ArmsTable | None:
    rows: list[tuple[str, ...]] = []
    for model, entries in paired.items():
        for benchmark, d in entries.items():
            # `verdict` speaks of losses: lower and higher are the same words here.
            said = verdict(d["low"], d["high"], d["against"])
            counts = f"{d['better']} better, {d['worse']} worse of {d['problems']}"
            difference = _interval(d["difference"], d, "+.1f")
            rows.append((f"{model} − {d['against']}", benchmark, difference, p_text(d["p_value"]), counts, said))
    head = ("models", "benchmark", "pass@1, points", "p", "problems", "what it shows")
    return ArmsTable(head, rows) if rows else None


def _outcomes(models: Mapping[str, Any]) -> ArmsTable:
    every = _each(models)
    names = list(dict.fromkeys(name for _, _, f in every for name in (*f["outcomes"], *f["notes"])))
    rows = [
        (f"{benchmark}, {model}", *(f"{f['outcomes'].get(n, f['notes'].get(n, 0)):,}" for n in names))
        for model, benchmark, f in every
    ]
    return ArmsTable(("benchmark, model", *(name.replace("_", " ") for name in names)), rows)


def _rates_chart(models: Mapping[str, Any]) -> str | None:
    """pass@1 with its interval, per benchmark and model."""
    colours = {model: n for n, model in enumerate(models)}
    rows = []
    for model, benchmark, f in _each(models):
        rate = f["pass_at"].get("1")
        if rate is not None and rate["value"] is not None:
            low, high = (math.nan if rate[end] is None else 100 * rate[end] for end in ("low", "high"))
            rows.append(Interval(f"{benchmark}, {model}", 100 * rate["value"], low, high, colours[model]))
    return interval_chart(rows, "pass@1 with 95 % intervals over problems", "%", WIDE[0]) if rows else None


def _rating_charts(models: Mapping[str, Any]) -> list[str]:
    """Rate over rating, per benchmark that has ratings, a line per model."""
    charts = []
    for benchmark in dict.fromkeys(b for _, b, f in _each(models) if f.get("ratings")):
        lines = []
        for model, name, f in _each(models):
            rated = {k: v for k, v in f.get("ratings", {}).items() if k != "unrated"} if name == benchmark else {}
            points = [(float(k.split("-")[0]), 100 * v["value"]) for k, v in rated.items()]
            if points:
                lines.append(Line(model, points, "marked"))
        if lines:
            charts.append(line_chart(lines, f"{benchmark} by rating", "%", WIDE, from_zero=True, x_label="rating from"))
    return charts


def _groups(models: Mapping[str, Any], failed: Sequence[dict[str, Any]]) -> list[FailureGroup]:
    groups = []
    for model, benchmark, f in _each(models):
        own = [x for x in failed if (x["model"], x["benchmark"]) == (model, benchmark)]
        count = sum(f["outcomes"].values()) - f["outcomes"].get("passed", 0)
        if own:
            groups.append(FailureGroup(f"{benchmark}, {model}", own, count))
    return groups


def write_evaluation_page(folder: Path, out: Path, config: Mapping[str, Any]) -> Path:
    """The page of an evaluation outside a run; returns its path."""
    view = evaluation_view(folder)
    if view is None:
        raise UserError(f"{folder} holds no {RESULTS_FILE}; run the evaluation first")
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    return write_page(out, "evaluation.html.j2", title=folder.resolve().name, evaluation=view, config=text)
