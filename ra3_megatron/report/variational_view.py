"""Figures and charts of an E-step."""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from ra3_megatron.report.charts import SMALL, WIDE, Line, line_chart, stacked_chart
from ra3_megatron.report.figures import Row, finite_series, last, number, scaled, series, with_error
from ra3_megatron.report.schema import METRICS

_STOPPED = {"steps": "all steps were taken", "flat": "the reward was flat"}

_LAYERS = (("rollout_seconds", "rollouts"), ("score_seconds", "scoring"), ("update_seconds", "update"))

# Title, and metric and label of each line; all lines of a chart have the first one's unit.
_CHARTS: tuple[tuple[str, tuple[tuple[str, str], ...], bool], ...] = (
    ("Reward over bare", (("reward_over_bare", "over bare"),), False),
    ("Rise of the probe's reward", (("probe_rise", "rise"),), False),
    ("Think rate", (("think_rate", "think rate"),), True),
    ("Length of a thought", (("thought_tokens", "thought"),), True),
    ("Duration τ of a latent", (("duration", "duration"),), True),
    ("γ\N{COMBINING MACRON}, mean of γ^τ", (("discount_of_duration", "gamma-bar"),), False),
    ("Gain of a thought", (("gain", "gain"),), False),
    ("Bounds", (("elbo", "temporal bound"), ("elbo_multi_sample", "of the whole group")), False),
    ("Effective outcomes of a decision", (("decision_perplexity", "decision"),), False),
    ("Surprise of a line", (("line_nats", "line"),), False),
    ("Calibration of p(think)", (("calibration_error", "expected error"), ("calibration_brier", "Brier score")), True),
    ("Sampled against trained log-prob", (("rollout_gap", "gap"),), True),
    (
        "Cut, not offered, clipped",
        (("truncated_thoughts", "thoughts cut"), ("not_offered", "not offered"), ("clipped", "actions clipped")),
        True,
    ),
    ("Lag", (("lag", "lag"),), True),
    ("Actions in the loss", (("actions", "actions"),), True),
    ("Policy loss", (("policy_loss", "policy loss"),), False),
    ("Gradient norm", (("grad_norm", "gradient norm"),), False),
    ("Learning rate", (("lr", "learning rate"),), False),
)
_ERRORS = {
    "reward": "reward_error",
    "reward_over_bare": "reward_over_bare_error",
    "probe_rise": "probe_rise_error",
    "gain": "gain_error",
}
_AS_REWARD = ("reward_over_bare", "probe_rise")


def variational_figures(records: Sequence[dict[str, Any]], result: dict[str, Any]) -> list[Row]:
    """Headline figures: of the DONE `result` where it is there, else of the records so far."""
    rewards = series(records, "reward")
    rows: list[Row] = []
    if records:
        rows.append(("steps", f"{records[-1]['step']:,}"))
    first, final = result.get("reward_first"), result.get("reward_last")
    if first is None and rewards:
        first, final = rewards[0][1], rewards[-1][1]
    if first is not None:
        rows.append(("reward, first → last", f"{number(first)} → {number(final)}"))
    before, after = result.get("probe_reward_before"), result.get("probe_reward_after")
    if before is not None and after is not None:
        rise = with_error(after - before, result.get("probe_rise_error"), "+.4f")
        rows.append(("rise on held-out snippets ± SE", rise))
    if "stopped" in result:
        rows.append(("ended because", _STOPPED.get(result["stopped"], str(result["stopped"]))))
    rows += [
        (label, value)
        for name, label, value in (
            ("think_rate", "think rate", number(last(records, "think_rate"), ".1%")),
            ("thought_tokens", "tokens of a thought", number(last(records, "thought_tokens"), ".2f")),
            ("duration", "τ, lines", number(last(records, "duration"), ".2f")),
            ("discount_of_duration", "γ\N{COMBINING MACRON}", number(last(records, "discount_of_duration"), ".3f")),
            ("gain", "gain ± SE, nats/token", with_error(last(records, "gain"), last(records, "gain_error"), "+.3f")),
        )
        if series(records, name)
    ]
    tokens = result.get("rollout_tokens", last(records, "rollout_tokens"))
    if tokens is not None:
        rows.append(("rollout tokens", scaled(tokens, "")))
    if result.get("flops") is not None:
        rows.append(("computed", scaled(result["flops"], "FLOP")))
    if (skipped := last(records, "skipped_steps")) is not None and skipped > 0:
        rows.append(("skipped steps", f"{skipped:,.0f}"))
    if (broken := last(records, "broken_programs")) is not None and broken > 0:
        rows.append(("rollouts dropped, other program", f"{broken:,.0f}"))
    return rows


def variational_charts(records: Sequence[dict[str, Any]], stage: str, reward_unit: str) -> list[Markup]:
    """Reward, in `reward_unit`, over the full width, then what else was measured, one unit a chart."""
    charts = []
    if rewards := finite_series(records, "reward"):
        line = Line("reward", rewards, "plain", errors=_errors(records, "reward"))
        charts.append(line_chart([line], "Reward, with a band of ± 1 standard error", reward_unit, WIDE, stage))
    for title, parts, from_zero in _CHARTS:
        lines = [
            Line(label, points, errors=_errors(records, name))
            for name, label in parts
            if (points := finite_series(records, name))
        ]
        # A lag that is 0 throughout says that nothing was stale, and needs no chart.
        if lines and not (parts[0][0] == "lag" and not any(y for _, y in lines[0].points)):
            charts.append(line_chart(lines, title, _unit(parts[0][0], reward_unit), SMALL, stage, from_zero))
    charts += _speed(records, stage)
    return [Markup(chart) for chart in charts]


def _speed(records: Sequence[dict[str, Any]], stage: str) -> list[str]:
    """Where the time of a step goes, and how many tokens a second the rollouts fed through the model."""
    charts = []
    layers = [Line(label, points) for name, label in _LAYERS if (points := series(records, name))]
    if layers and all([x for x, _ in layer.points] == [x for x, _ in layers[0].points] for layer in layers):
        charts.append(stacked_chart(layers, "Time of a step", "seconds", SMALL, stage))
    tokens = dict(series(records, "rollout_tokens"))
    seconds = dict(series(records, "rollout_seconds"))
    rates, so_far = [], 0.0
    for step, total in sorted(tokens.items()):
        # Steps that share their rollouts with the one before drew nothing, and took no time.
        if total > so_far and seconds.get(step, 0.0) > 0:
            rates.append((step, (total - so_far) / seconds[step]))
        so_far = total
    if rates:
        charts.append(
            line_chart([Line("speed", rates)], "Rollouts, speed of a replica", "tokens/s", SMALL, stage, True)
        )
    if points := finite_series(records, "rollout_tokens"):
        charts.append(line_chart([Line("t", points)], "Rollouts so far, a replica", "tokens", SMALL, stage, True))
    return charts


def _errors(records: Sequence[dict[str, Any]], name: str) -> list[float] | None:
    """Standard errors beside the points of `name`; 0 where a point has none; None for a metric that has none at all."""
    if name not in _ERRORS:
        return None
    errors = dict(series(records, _ERRORS[name]))
    found = [errors.get(step, math.nan) for step, _ in series(records, name)]
    return [e if math.isfinite(e) else 0.0 for e in found] if any(math.isfinite(e) for e in found) else None


def _unit(name: str, reward_unit: str) -> str:
    unit = reward_unit if name in _AS_REWARD else METRICS[name].unit
    return "" if unit == "1" else unit
