"""Figures, charts and samples of an RLVR stage."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ra3_megatron.config.errors import UserError
from ra3_megatron.report.charts import SMALL, WIDE, Line, line_chart, stacked_chart
from ra3_megatron.report.figures import Row, finite_series, last, number, scaled, series, with_error
from ra3_megatron.report.schema import METRICS

SHOWN_TEXT = 4000
"""Characters of a prompt or an answer that the page shows."""
SHOWN_MOMENTS = 3
"""Steps of which groups are shown: the first, the last, and those between at equal distances."""

_PARTS = (
    ("rollout_seconds", "answers"),
    ("judge_seconds", "waiting for verdicts"),
    ("score_seconds", "other policies"),
    ("update_seconds", "update"),
)

_SPLIT_PARTS = (
    ("trainer_idle_seconds", "waiting for answers"),
    ("transfer_seconds", "weights to the others"),
    ("score_seconds", "other policies"),
    ("update_seconds", "update"),
)
"""The same on the side that trains where others draw."""

# Title, metric and label of each line, whether the axis starts at 0; all lines of a chart have the first one's unit.
_CHARTS: tuple[tuple[str, tuple[tuple[str, str], ...], bool], ...] = (
    ("Reward of an answer", (("answer_reward", "mean"), ("answer_reward_spread", "spread")), True),
    ("Tests passed", (("tests_passed", "share of an answer's tests"),), True),
    ("Groups", (("groups", "drawn"), ("groups_used", "learned from"), ("groups_flat", "all answers alike")), True),
    ("Groups all right, all wrong", (("groups_all_right", "all right"), ("groups_all_wrong", "all wrong")), True),
    ("Length of an answer", (("answer_tokens", "in training"), ("validation_answer_tokens", "held out")), True),
    (
        "How answers ended",
        (("truncated_answers", "cut"), ("ended_by_id", "end of text"), ("ended_by_text", "stop text")),
        True,
    ),
    (
        "Programs that failed",
        (
            ("verdict_wrong", "wrong"),
            ("verdict_exception", "exception"),
            ("verdict_missing", "no such function"),
            ("verdict_cpu_limit", "too long"),
            ("verdict_crashed", "crashed"),
            ("verdict_lost", "lost"),
        ),
        True,
    ),
    ("Estimated entropy", (("answer_nats", "-log-prob"),), True),
    ("Sampled against trained log-prob", (("rollout_gap", "gap"),), True),
    ("Tokens clipped", (("clipped", "clipped"),), True),
    ("Divergence from the start", (("reference_kl", "KL"),), True),
    ("Lag", (("lag", "lag"),), True),
    ("Tokens in the loss", (("loss_tokens", "tokens"),), True),
    ("Policy loss", (("policy_loss", "policy loss"),), False),
    ("Gradient norm", (("grad_norm", "gradient norm"),), True),
    ("Learning rate", (("lr", "learning rate"),), True),
)


def is_rlvr(folder: Path) -> bool:
    """Whether a stage's folder is one of RLVR: `<nn>-rlvr` or `<nn>-<arm>-rlvr`."""
    return folder.name.endswith("-rlvr")


def rlvr_figures(records: Sequence[dict[str, Any]], result: dict[str, Any]) -> list[Row]:
    """Headline figures: of the DONE `result` where it is there, else of the records so far."""
    rows: list[Row] = []
    if records:
        rows.append(("steps", f"{records[-1]['step']:,}"))
    held_out = series(records, "validation_pass_rate")
    if held_out:
        error = last(records, "validation_pass_error")
        rows.append(("held-out tasks passed, before", number(held_out[0][1], ".1%")))
        rows.append(("held-out tasks passed ± SE", with_error(held_out[-1][1], error, ".1%")))
    rates = series(records, "pass_rate")
    if rates:
        rows.append(("answers passed, first → last step", f"{rates[0][1]:.1%} → {rates[-1][1]:.1%}"))
    rows += [
        (label, value)
        for name, label, value in (
            ("samples", "answers", number(last(records, "samples"), ",.0f")),
            ("answer_tokens", "tokens of an answer", number(last(records, "answer_tokens"), ".1f")),
            ("truncated_answers", "answers cut", number(last(records, "truncated_answers"), ".1%")),
            ("refilled", "tasks replaced", number(last(records, "refilled"), ",.0f")),
            ("rollout_tokens", "rollout tokens", scaled(last(records, "rollout_tokens"), "")),
        )
        if series(records, name)
    ]
    if (lost := last(records, "lost_answers")) is not None and lost > 0:
        rows.append(("answers lost by the judge", f"{lost:,.0f}"))
    if (skipped := last(records, "skipped_steps")) is not None and skipped > 0:
        rows.append(("skipped updates", f"{skipped:,.0f}"))
    if result.get("flops") is not None:
        rows.append(("computed", scaled(result["flops"], "FLOP")))
    return rows


def rlvr_charts(records: Sequence[dict[str, Any]], stage: str) -> list[Markup]:
    """Pass rates over the full width, then what else was measured, one unit a chart."""
    lines = [Line("answers of the step", points)] if (points := finite_series(records, "pass_rate")) else []
    if points := finite_series(records, "validation_pass_rate"):
        lines.append(Line("held-out tasks", points, "marked"))
    charts = [line_chart(lines, "Pass rate", "fraction", WIDE, stage, True)] if lines else []
    for title, parts, from_zero in _CHARTS:
        lines = [Line(label, points) for name, label in parts if (points := finite_series(records, name))]
        if len(parts) > 1:
            # What never happened needs no line among others.
            lines = [line for line in lines if any(y for _, y in line.points)]
        # A lag that is 0 throughout says that nothing was stale, and needs no chart.
        if lines and not (parts[0][0] == "lag" and not any(y for _, y in lines[0].points)):
            unit = METRICS[parts[0][0]].unit
            charts.append(line_chart(lines, title, "" if unit == "1" else unit, SMALL, stage, from_zero))
    time_of = _SPLIT_PARTS if series(records, "trainer_idle_seconds") else _PARTS
    layers = [Line(label, points) for name, label in time_of if (points := series(records, name))]
    if layers and all([x for x, _ in layer.points] == [x for x, _ in layers[0].points] for layer in layers):
        charts.append(stacked_chart(layers, "Time of a step", "seconds", SMALL, stage))
    return [Markup(chart) for chart in charts]


@dataclass(frozen=True)
class ShownGroup:
    """The answers to one task, ready for the page."""

    step: int
    task: str
    prompt: str
    answers: list[dict[str, str]]
    """`text`, `reward`, `verdict` (in words), `right` (empty or `right`)."""


def shown_groups(folder: Path) -> list[ShownGroup]:
    """Groups of some steps from the stage's `data/samples`; empty where there are none.

    Raises UserError for a damaged file.
    """
    files = sorted((folder / "data" / "samples").glob("step_*.json"))
    if len(files) > SHOWN_MOMENTS:
        places = [round(i * (len(files) - 1) / (SHOWN_MOMENTS - 1)) for i in range(SHOWN_MOMENTS)]
        files = [files[i] for i in places]
    found = []
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}); delete it and build the report again") from None
        found += [_shown(content["step"], group) for group in content["groups"]]
    return found


def _shown(step: int, group: dict[str, Any]) -> ShownGroup:
    answers = []
    for a in group["answers"]:
        tests = f"{a['passed']} of {a['total']} tests" if a["outcome"] != "passed" else f"all {a['total']} tests"
        said = f": {a['message']}" if a["message"] else ""
        ended = ", cut" if a["finish"] == "length" else ""
        answers.append(
            {
                "text": _cut(a["text"]),
                "reward": f"{a['reward']:g}",
                "verdict": f"{a['outcome']}, {tests}, {a['tokens']} tokens{ended}{said}",
                "right": "right" if a["outcome"] == "passed" else "",
            }
        )
    return ShownGroup(step, group["task"], _cut(group["prompt"]), answers)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_TEXT else text[:SHOWN_TEXT] + " …"
