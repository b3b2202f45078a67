"""`report.html` of a run: one file, readable offline, built from what lies in the run folder and nothing else."""

import json
import math
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ra3_megatron import __version__
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import DONE, atomic_write_text, is_done
from ra3_megatron.report.charts import Line, line_chart, smooth
from ra3_megatron.report.environment import ENVIRONMENT_FILE, redact
from ra3_megatron.report.progress import format_duration, format_rate
from ra3_megatron.report.schema import METRICS, METRICS_FILE, WALL, read_metrics

REPORT_FILE = "report.html"
_STAGE = re.compile(r"\d+-.+")

Row = tuple[str, str]


@dataclass(frozen=True)
class StageView:
    """What the report says of one stage, ready for the page."""

    name: str
    """Folder name, such as `02-midtrain`."""
    finished: bool
    """Whether it has its DONE."""
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


def build_report(run_dir: Path | str) -> Path:
    """Write `<run_dir>/report.html` from the files in the run folder and return its path.

    Works on an unfinished run too. Raises UserError if the folder holds no run or a damaged metrics file.
    """
    run_dir = Path(run_dir)
    config_file = run_dir / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"no run at {run_dir}: {config_file} does not exist; give the run.dir of a run")
    config = redact(yaml.safe_load(config_file.read_text(encoding="utf-8")))
    stages = [_stage_view(folder) for folder in stage_folders(run_dir)]
    template = Environment(
        loader=PackageLoader("ra3_megatron.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    ).get_template("report.html.j2")
    page = template.render(
        title=run_dir.resolve().name,
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
        version=__version__,
        finished=bool(stages) and all(stage.finished for stage in stages),
        facts=_facts(config),
        stages=stages,
        attempts=list(_attempts(run_dir)),
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
    )
    path = run_dir / REPORT_FILE
    atomic_write_text(path, page)
    return path


def stage_folders(run_dir: Path) -> list[Path]:
    """The `<nn>-<stage>` folders of a run, in order."""
    found = [p for p in run_dir.iterdir() if p.is_dir() and _STAGE.fullmatch(p.name)]
    return sorted(found, key=lambda p: (int(p.name.split("-", 1)[0]), p.name))


# -------------------------------------------------------------------------------------------------- one stage


def _stage_view(folder: Path) -> StageView:
    metrics = folder / METRICS_FILE
    records = read_metrics(metrics) if metrics.exists() else []
    return StageView(
        name=folder.name,
        finished=is_done(folder),
        figures=_figures(records),
        charts=_charts(records, folder.name),
        validation=[(str(s), f"{y:.4f}") for s, y in _series(records, "validation_loss")],
        counts=[(name, rows) for name, content in _count_files(folder / "data") if (rows := flatten_numbers(content))],
        checkpoints=_checkpoints(folder / "checkpoints"),
        outcome=_outcome(folder),
    )


def _series(records: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of every record that has the metric."""
    inside = (lambda r: r.get(WALL, {})) if METRICS[name].wall else (lambda r: r)
    return [(record["step"], inside(record)[name]) for record in records if name in inside(record)]


def _figures(records: Sequence[dict[str, Any]]) -> list[Row]:
    """Headline figures of a stage, those that were measured."""

    def last(name: str) -> float | None:
        series = _series(records, name)
        return series[-1][1] if series else None

    rows: list[Row] = []
    if records:
        rows.append(("steps", f"{records[-1]['step']:,}"))
    if (tokens := last("tokens")) is not None:
        rows.append(("tokens, padding included", f"{tokens:,.0f}"))
    if (loss := last("loss")) is not None:
        rows.append(("training loss", f"{loss:.4f}"))
    validation = _series(records, "validation_loss")
    if validation:
        first, final = validation[0][1], validation[-1][1]
        rows.append(("validation loss", f"{final:.4f}" if len(validation) == 1 else f"{first:.4f} → {final:.4f}"))
        if math.isfinite(final) and final < 20:
            rows.append(("validation perplexity", f"{math.exp(final):.2f}"))
    if speeds := [y for _, y in _series(records, "tokens_per_second")]:
        rows.append(("median tokens/s", format_rate(statistics.median(speeds))))
    if (mfu := last("mfu")) is not None:
        rows.append(("model FLOP utilisation", f"{mfu:.1%}"))
    if (memory := last("peak_memory_bytes")) is not None:
        rows.append(("peak memory", format_bytes(memory)))
    if (skipped := last("skipped_steps")) is not None and skipped > 0:
        rows.append(("skipped steps", f"{skipped:,.0f}"))
    times = [y for _, y in _series(records, "time")]
    if len(times) > 1:
        # Gaps between attempts count in, which is what a person waiting for the run sees.
        rows.append(("first to last record", format_duration(times[-1] - times[0])))
    return rows


def _charts(records: Sequence[dict[str, Any]], stage: str) -> list[Markup]:
    """Loss over the full width, then what else was measured."""
    charts = []
    losses, validation = _series(records, "loss"), _series(records, "validation_loss")
    lines = []
    if len(losses) >= 50:
        lines = [
            Line("training", losses, "faint"),
            Line("training, smoothed", smooth(losses, max(5, len(losses) // 40))),
        ]
    elif losses:
        lines = [Line("training", losses)]
    if validation:
        lines.append(Line("validation", validation, "marked"))
    if lines:
        charts.append(line_chart(lines, "Loss", METRICS["loss"].unit, (10.6, 3.4), salt=stage))
    for name, title, unit, from_zero in (
        ("lr", "Learning rate", "", False),
        ("grad_norm", "Gradient norm", "", False),
        ("tokens_per_second", "Speed", METRICS["tokens_per_second"].unit, True),
        ("mfu", "Model FLOP utilisation", "", True),
    ):
        if series := _series(records, name):
            charts.append(line_chart([Line(title, series)], title, unit, salt=stage, from_zero=from_zero))
    return [Markup(chart) for chart in charts]


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


def _outcome(folder: Path) -> list[Row]:
    """The fields of a DONE that holds a JSON object; a bare DONE says nothing more."""
    text = (folder / DONE).read_text(encoding="utf-8").strip() if is_done(folder) else ""
    if not text.startswith("{"):
        return []
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / DONE} is damaged ({error}); delete it and run again") from None
    # Counts of a corpus have a table of their own, from the file beside the corpus.
    return list(_leaves({k: v for k, v in redact(content).items() if k != "counts"}))


# -------------------------------------------------------------------------------------------------- the run


def _attempts(run_dir: Path) -> Iterator[tuple[str, list[Row]]]:
    """Stage, attempt and environment of every attempt that left its dossier."""
    for path in sorted(run_dir.glob(f"*-*/logs/*/{ENVIRONMENT_FILE}")):
        if not path.parent.is_symlink():
            content = redact(json.loads(path.read_text(encoding="utf-8")))
            name = f"{path.parents[2].name}, attempt {path.parent.name}"
            yield name, [(k, v) for k, v in _leaves(content) if v not in ("", "None")]


def _facts(config: dict[str, Any]) -> list[Row]:
    """The few settings a reader asks for first."""

    def get(key: str) -> Any:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    sizes = (("TP", "tensor"), ("PP", "pipeline"), ("CP", "context"))
    parallel = [f"{short}\N{NO-BREAK SPACE}{size}" for short, name in sizes if (size := get(f"parallel.{name}"))]
    corpus = " ".join(str(v) for v in (get("data.corpus.kind"), get("data.corpus.path")) if v)
    rows = [
        ("arms", ", ".join(get("run.arms") or [])),
        ("model", get("model.source") or "random weights"),
        ("precision", get("model.precision")),
        ("corpus", corpus),
        ("sequence length", get("train.seq_length")),
        ("global batch", get("train.global_batch_size")),
        ("parallel sizes", " · ".join(parallel)),
        ("seed", get("run.seed")),
    ]
    return [(label, str(value)) for label, value in rows if value not in (None, "")]


# -------------------------------------------------------------------------------------------------- plain data


def _count_files(folder: Path) -> Iterator[tuple[str, Any]]:
    """The `report.json` files that preparation left in `folder`, with their place in it."""
    for path in sorted(folder.rglob("report.json")):
        place = path.relative_to(folder).parent
        yield str(place) if place.parts else "counts", json.loads(path.read_text(encoding="utf-8"))


def flatten_numbers(content: Any, prefix: str = "") -> list[Row]:
    """Every number in nested dicts as (`outer / inner`, formatted value); lists, texts and booleans are left out.

    A count that comes with its `meaning` is one row that says it.
    """
    if isinstance(content, dict):
        if content.keys() == {"count", "meaning"}:
            return [(f"{row[0]}: {content['meaning']}", row[1]) for row in flatten_numbers(content["count"], prefix)]
        return [row for k, v in content.items() for row in flatten_numbers(v, f"{prefix} / {k}" if prefix else str(k))]
    if isinstance(content, bool) or not isinstance(content, int | float):
        return []
    return [(prefix.replace("_", " "), f"{content:,}" if isinstance(content, int) else f"{content:,.6g}")]


def _leaves(content: Any, prefix: str = "") -> Iterator[Row]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _leaves(value, f"{prefix} / {key}" if prefix else str(key))
    elif isinstance(content, list):
        yield prefix, ", ".join(str(item) for item in content)
    else:
        yield prefix, str(content)


def format_bytes(count: float) -> str:
    """Bytes in the binary unit that leaves one to four figures, such as `1.9 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
