"""`report.html` of a run: one file, readable offline, built from what lies in the run folder and nothing else."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from ra3_megatron.config.errors import UserError
from ra3_megatron.report.arms import arms_view
from ra3_megatron.report.compare_report import COMPARE_FILE, comparison_view
from ra3_megatron.report.environment import ENVIRONMENT_FILE, redact
from ra3_megatron.report.evaluation_view import evaluation_view
from ra3_megatron.report.figures import Row, leaves
from ra3_megatron.report.page import write_page
from ra3_megatron.report.rationales import embed_rationales, rationale_sources
from ra3_megatron.report.schema import METRICS_FILE, read_metrics
from ra3_megatron.report.stage_view import stage_view

REPORT_FILE = "report.html"
PAGE_BYTES = 4_800_000
"""What a page may weigh, about: rationales get what the charts leave of it."""
MIN_RATIONALE_BYTES = 300_000
"""Room for rationales however heavy the rest of the page is."""
_STAGE = re.compile(r"\d+-.+")


def build_report(run_dir: Path | str) -> Path:
    """Write `<run_dir>/report.html` from the files in the run folder and return its path.

    Works on an unfinished run too. Raises UserError if the folder holds no run or a damaged file.
    """
    run_dir = Path(run_dir)
    config_file = run_dir / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"no run at {run_dir}: {config_file} does not exist; give the run.dir of a run")
    config = redact(yaml.safe_load(config_file.read_text(encoding="utf-8")))
    folders = stage_folders(run_dir)
    records = {folder.name: _records(folder) for folder in folders}
    per_line = (config.get("variational") or {}).get("reward") == "sum"
    unit = "nats per line" if per_line else "nats per token"
    stages = [stage_view(folder, records[folder.name], unit) for folder in folders]
    arms = arms_view(folders, records)
    compared = comparison_view(run_dir / COMPARE_FILE) if (run_dir / COMPARE_FILE).is_file() else None
    evaluations = [view for folder in folders if (view := evaluation_view(folder)) is not None]
    weight = sum(len(chart) for view in (*stages, arms, compared, *evaluations) if view for chart in view.charts)
    sources = [source for folder in folders for source in rationale_sources(folder)]
    rationales = None
    if sources:
        rationales = embed_rationales(sources, max(MIN_RATIONALE_BYTES, PAGE_BYTES - weight - 200_000))
    return write_page(
        run_dir / REPORT_FILE,
        "report.html.j2",
        title=run_dir.resolve().name,
        finished=bool(stages) and all(stage.finished for stage in stages),
        facts=_facts(config),
        arms=arms,
        compared=compared,
        evaluations=evaluations,
        stages=stages,
        rationales=rationales,
        rationale_data=Markup(rationales.json) if rationales else "",
        attempts=list(_attempts(run_dir)),
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
    )


def stage_folders(run_dir: Path) -> list[Path]:
    """The `<nn>-<stage>` folders of a run, in order."""
    found = [p for p in run_dir.iterdir() if p.is_dir() and _STAGE.fullmatch(p.name)]
    return sorted(found, key=lambda p: (int(p.name.split("-", 1)[0]), p.name))


def _records(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS_FILE
    return read_metrics(path) if path.exists() else []


def _attempts(run_dir: Path) -> Iterator[tuple[str, list[Row]]]:
    """Stage, attempt and environment of every attempt that left its dossier."""
    for path in sorted(run_dir.glob(f"*-*/logs/*/{ENVIRONMENT_FILE}")):
        if not path.parent.is_symlink():
            content = redact(json.loads(path.read_text(encoding="utf-8")))
            name = f"{path.parents[2].name}, attempt {path.parent.name}"
            yield name, [(k, v) for k, v in leaves(content) if v not in ("", "None")]


def _facts(config: dict[str, Any]) -> list[Row]:
    """The few settings a reader asks for first."""

    def get(key: str) -> Any:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    sizes = (("TP", "tensor"), ("PP", "pipeline"), ("CP", "context"), ("EP", "expert"))
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
