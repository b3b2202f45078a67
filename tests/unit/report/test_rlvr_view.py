"""What the report says of an RLVR stage."""

import json
from pathlib import Path

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.rlvr import RlvrConfig
from ra3_megatron.config.sections import ReportConfig
from ra3_megatron.report.metrics import MetricsLog
from ra3_megatron.report.run_report import build_report
from ra3_megatron.report.schema import read_metrics
from ra3_megatron.report.stage_view import stage_view
from ra3_megatron.rollout.answer_figures import AnswerFigures
from ra3_megatron.rollout.groups import flat
from tests.unit.rollout.judged import group


def write_stage(stage: Path, steps: int = 12) -> Path:
    """A stage whose answers become right."""
    config = RlvrConfig()
    with MetricsLog(stage, ReportConfig(tensorboard=False), True) as log:
        log.log(0, validation_pass_rate=0.1, validation_pass_error=0.02)
        for step in range(1, steps + 1):
            groups = [group(step, [m < step % 5 for m in range(4)]), group(step, [True, True])]
            figures = AnswerFigures.of(groups, flat(groups, config), config).metrics()
            walls = {f"{n}_seconds": 1.0 + step for n in ("rollout", "judge", "score", "update")}
            log.log(step, **figures, **walls, lag=0, refilled=step, samples=6 * step, rollout_tokens=100.0 * step)
        log.log(steps, validation_pass_rate=0.85, validation_pass_error=0.03)
    for step in (1, 4, 8, steps):
        answer = {"text": "return <b>x</b>", "reward": 1.0, "outcome": "passed", "passed": 3, "total": 3, "message": "",
                  "tokens": 7, "finish": "stop"}  # fmt: skip
        wrong = {**answer, "reward": 0.0, "outcome": "wrong", "passed": 1, "message": "the last answer was 3"}
        content = {"step": step, "groups": [{"task": f"t/{step}", "prompt": "def f(x):", "answers": [answer, wrong]}]}
        path = stage / "data" / "samples" / f"step_{step:08d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return stage


def test_figures_charts_and_answers(tmp_path: Path) -> None:
    """A stage without the figure it was made for, a chart without a line, answers that are markup on the page."""
    stage = write_stage(tmp_path / "run" / "03-ra3-rlvr")
    view = stage_view(stage, read_metrics(stage / "metrics.jsonl"), "nats per token")
    figures = dict(view.figures)
    assert figures["held-out tasks passed, before"] == "10.0%"
    assert figures["held-out tasks passed ± SE"].startswith("85.0%")
    assert view.many
    assert "Pass rate" in view.charts[0]
    assert any("Time of a step" in chart for chart in view.charts)
    assert not any("Lag" in chart for chart in view.charts)
    assert [g.step for g in view.groups] == [1, 8, 12]
    (tmp_path / "run" / "config.yaml").write_text("run: {arms: [ra3]}\n")
    page = build_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "return &lt;b&gt;x&lt;/b&gt;" in page
    assert "wrong, 1 of 3 tests, 7 tokens: the last answer was 3" in page


def test_a_damaged_sample_is_named(tmp_path: Path) -> None:
    """A torn file of samples broke the report with a traceback."""
    stage = write_stage(tmp_path / "00-rlvr")
    (stage / "data" / "samples" / "step_00000001.json").write_text("{")
    with pytest.raises(UserError, match="step_00000001"):
        stage_view(stage, read_metrics(stage / "metrics.jsonl"), "nats per token")
