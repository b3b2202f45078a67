"""FP8 in the report."""

from ra3_megatron.report.fp8_view import fp8_charts, fp8_figures

RECORDS = [
    {
        "step": step,
        "fp8_probe_loss": 2.5 - step / 10,
        "fp8_probe_bf16_loss": 2.49 - step / 10,
        "fp8_probe_difference": 0.004 * step,
        "fp8_nonfinite": step - 1,
        "fp8_input_overflow": 0.0,
        "fp8_input_underflow": 0.01,
        **{f"fp8_{kind}_amax_{q}": 2.0 ** (q - step) for kind in ("input", "gradient") for q in (1, 2, 3, 4)},
    }
    for step in (1, 2)
]


def test_figures_are_the_worst():
    """The last difference instead of the largest, a NaN at an earlier step gone from sight."""
    assert fp8_figures(RECORDS) == [
        ("FP8 against BF16, loss, largest difference", "0.800%"),
        ("NaN or infinite values seen in FP8 layers", "1"),
    ]
    assert fp8_figures([{"step": 1, "loss": 1.0}]) == []


def test_charts_of_what_was_measured():
    """An empty chart for what the recipe does not have, or for what never happened."""
    titles = " ".join(fp8_charts(RECORDS, "04-ntp"))
    assert len(fp8_charts(RECORDS, "04-ntp")) == 5
    assert "Largest inputs in FP8 layers" in titles
    assert "Largest weights" not in titles
    assert "beyond FP8" not in titles
    assert "rounded to zero" in titles
    assert fp8_charts([{"step": 1, "loss": 1.0}], "04-ntp") == []
