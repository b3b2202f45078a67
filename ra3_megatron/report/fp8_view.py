"""What the report says of FP8: its loss beside BF16's, and the health of its numbers."""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from ra3_megatron.report.charts import SMALL, Line, line_chart
from ra3_megatron.report.figures import Row, finite_series, number, series

_KINDS = (("input", "inputs"), ("weight", "weights"), ("gradient", "gradients"))


def fp8_figures(records: Sequence[dict[str, Any]]) -> list[Row]:
    """Headline figures; none of a stage that did not train in FP8."""
    rows: list[Row] = []
    if differences := [y for _, y in series(records, "fp8_probe_difference")]:
        rows.append(("FP8 against BF16, loss, largest difference", number(max(differences), ".3%")))
    if nonfinite := sum(y for _, y in series(records, "fp8_nonfinite")):
        rows.append(("NaN or infinite values seen in FP8 layers", f"{nonfinite:,.0f}"))
    return rows


def fp8_charts(records: Sequence[dict[str, Any]], stage: str) -> list[Markup]:
    """Losses, largest values as powers of two, and shares of values lost at either end of the range."""
    charts = []
    probe = (("fp8_probe_loss", "FP8"), ("fp8_probe_bf16_loss", "BF16"))
    lines = [Line(label, points, "marked") for name, label in probe if (points := finite_series(records, name))]
    if lines:
        charts.append(line_chart(lines, "Loss on one micro-batch", "nats per token", SMALL, stage))
    if points := finite_series(records, "fp8_probe_difference"):
        lines = [Line("difference", points, "marked")]
        charts.append(line_chart(lines, "FP8 against BF16, loss", "fraction", SMALL, stage, True))
    for kind, label in _KINDS:
        lines = [
            Line(f"layers, quarter {quarter}", [(x, math.log2(y)) for x, y in points if y > 0])
            for quarter in (1, 2, 3, 4)
            if (points := finite_series(records, f"fp8_{kind}_amax_{quarter}"))
        ]
        if lines:
            charts.append(line_chart(lines, f"Largest {label} in FP8 layers", "log2", SMALL, stage))
    for flow, label in (("over", "beyond FP8's range"), ("under", "rounded to zero")):
        lines = [
            Line(what, points) for kind, what in _KINDS if (points := finite_series(records, f"fp8_{kind}_{flow}flow"))
        ]
        # What never happened needs no chart.
        if any(y for line in lines for _, y in line.points):
            charts.append(line_chart(lines, f"Values {label}", "fraction", SMALL, stage, True))
    return [Markup(chart) for chart in charts]
