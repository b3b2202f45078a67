"""What the report says of E-steps, of arms and of comparisons over seeds."""

import json
import math
import re
from pathlib import Path

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.report.arms import arms_view, verdict
from ra3_megatron.report.charts import Interval, Line, interval_chart, line_chart, stacked_chart
from ra3_megatron.report.compare_report import build_compare_report, comparison_view
from ra3_megatron.report.figures import interval, number, scaled, with_error
from ra3_megatron.report.run_report import build_report, stage_folders
from ra3_megatron.report.schema import read_metrics
from ra3_megatron.report.stage_view import StageView, stage_view
from tests.unit.report.sample_run import comparison, measured, write_estep, write_measure, write_run, write_sft


def records_of(run: Path) -> dict:
    paths = {folder.name: folder / "metrics.jsonl" for folder in stage_folders(run)}
    return {name: read_metrics(path) if path.exists() else [] for name, path in paths.items()}


def titles(charts: list) -> list[str]:
    return [re.search('aria-label="([^"]*)"', chart)[1] for chart in charts]


def view_of(stage: Path) -> StageView:
    return stage_view(stage, read_metrics(stage / "metrics.jsonl"), "nats per token")


def test_a_whole_run_is_one_page_under_the_limit(tmp_path: Path) -> None:
    """Every part was right by itself and the page of a real run was 20 MB."""
    run = write_run(tmp_path / "run", steps=16, snippets=12)
    (run / "compare.json").write_text(json.dumps(comparison()))
    text = build_report(run).read_text(encoding="utf-8")
    assert len(text) < 5_000_000
    for part in ("arms", "seeds", "rationales", "02-ra3-variational-1"):
        assert text.count(f'id="{part}"') == 1
        assert f'href="#{part}"' in text
    assert "24 of 24 snippets are in this page." in text
    assert not re.search(r"""(?:src|href)=["'](?!#)""", text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert all(ids.count(i) == 1 for i in set(ids) if f"#{i}" in text), "a reference is to one element"


def test_headline_figures_of_an_estep(tmp_path: Path) -> None:
    """The rise was the last reward less the first, which are of different snippets."""
    write_estep(tmp_path / "02-ra3-variational-1", steps=30, snippets=1)
    figures = dict(view_of(tmp_path / "02-ra3-variational-1").figures)
    assert figures["reward, first → last"] == "−0.9135 → −0.8122"
    assert figures["rise on held-out snippets ± SE"] == "+0.1060 ± 0.0210"
    assert figures["ended because"] == "the reward was flat"
    assert figures["computed"] == "3.21 PFLOP"
    assert figures["think rate"] == "37.2%"


def test_an_estep_under_way_has_figures_and_charts(tmp_path: Path) -> None:
    """There was nothing to look at before DONE."""
    stage = tmp_path / "02-ra3-variational-1"
    write_estep(stage, steps=12, snippets=1)
    (stage / "DONE").unlink()
    view = view_of(stage)
    assert "reward, first → last" in dict(view.figures)
    assert "rise on held-out snippets ± SE" not in dict(view.figures)
    names = titles(view.charts)
    assert names[0].startswith("Reward")
    for wanted in ("Think rate", "Gain of a thought", "Bounds", "Time of a step", "Calibration of p(think)"):
        assert wanted in names
    assert "Lag" not in names, "nothing was stale"


def test_losses_of_one_unit_are_in_one_chart(tmp_path: Path) -> None:
    """Text without thoughts had the same curve three times under three names."""
    write_sft(tmp_path / "a", 10, thoughts=True, final=1.3)
    write_sft(tmp_path / "b", 10, thoughts=False, final=1.3)
    with_thoughts, without = (view_of(tmp_path / name).charts[0] for name in "ab")
    for label in ("training, code tokens", "validation, code given the thoughts", "validation, code without thoughts"):
        assert label in with_thoughts
        assert label not in without
    assert titles(view_of(tmp_path / "a").charts).count("Loss") == 1


def test_arms_say_what_was_measured(tmp_path: Path) -> None:
    """A smaller figure was called better though the interval of the difference held 0."""
    run = write_run(tmp_path / "run", steps=16, snippets=1)
    view = arms_view(stage_folders(run), records_of(run))
    rows = {row[0]: dict(zip(view.table.head, row, strict=True)) for row in view.table.rows}
    assert list(rows) == ["base", "ra3", "self_comment", "ntp"]
    assert rows["ra3"]["no thoughts"] == "1.3142 [1.2942, 1.3352]"
    assert rows["ra3"]["compute"] == "4.4 PFLOP"
    assert rows["base"]["time"] == "–"
    says = {row[:2]: row[-1] for row in view.paired.rows}
    assert says["ra3 − ntp", "no thoughts"] == "lower than ntp"
    assert says["self_comment − ntp", "no thoughts"] == "no difference shown"
    assert says["self_comment − ntp", "own thoughts − no thoughts"] == "higher than ntp"
    learning = view.charts[-1]
    assert all(f">{arm}<" in learning for arm in ("ra3", "self_comment", "ntp"))
    assert "raw code tokens seen" in learning


def test_arms_are_drawn_over_passes_until_their_tokens_are_known(tmp_path: Path) -> None:
    """The chart was there only at the end, when nobody waits for it; one arm alone was compared with nothing."""
    for name in ("02-ra3-sft-1", "03-ra3-sft-2"):
        write_sft(tmp_path / name, 16, thoughts=True, final=1.3)
    assert arms_view(stage_folders(tmp_path), records_of(tmp_path)) is None
    write_sft(tmp_path / "04-ntp", 16, thoughts=False, final=1.3)
    view = arms_view(stage_folders(tmp_path), records_of(tmp_path))
    assert view.table is None
    assert "passes over the corpus" in view.charts[0]
    # Two rounds are two passes, one after the other.
    assert ">2.0<" in view.charts[0]


def test_damaged_measurement_is_named(tmp_path: Path) -> None:
    """A traceback for half a file."""
    write_measure(tmp_path / "08-measure", 1)
    (tmp_path / "08-measure" / "measured.json").write_text(json.dumps(measured())[:50])
    with pytest.raises(UserError, match=r"08-measure.measured\.json cannot be read"):
        arms_view([tmp_path / "08-measure"], {})


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (-0.2, -0.1, "lower than ntp"),
        (0.1, 0.2, "higher than ntp"),
        (-0.1, 0.1, "no difference shown"),
        (0.0, 0.1, "no difference shown"),
        (None, 0.1, "not known"),
        (math.nan, 0.1, "not known"),
    ],
)
def test_verdict(low: float | None, high: float | None, text: str) -> None:
    """One seed has no interval over seeds, and was called a difference."""
    assert verdict(low, high, "ntp") == text


def test_comparison_page(tmp_path: Path) -> None:
    """The sweep was drawn in the order the prices were given."""
    path = tmp_path / "seeds" / "compare.json"
    path.parent.mkdir()
    path.write_text(json.dumps(comparison()))
    page = build_compare_report(path)
    assert page == tmp_path / "seeds" / "compare.html"
    view = comparison_view(path)
    costs, thinking = view.summary
    assert costs.rows[0][:3] == ("ra3", "1.3110 [1.3044, 1.3176]", "1.2900 [1.2835, 1.2964]")
    assert thinking.head == ("arm", "think rate", "seeds")
    assert [row[-1] for row in view.paired.rows] == ["lower than ntp", "no difference shown"]
    assert len(view.rows.rows) == 6
    assert titles(view.charts)[1:] == ["Think rate by price of a thought", "Reward by price of a thought"]
    ticks = re.findall(r">(0\.01|0\.05|0\.2)</text>", view.charts[2])
    assert ticks == ["0.01", "0.05", "0.2"]
    assert "<script" not in page.read_text(encoding="utf-8")


def test_comparison_without_sweep_and_with_unknown_ends(tmp_path: Path) -> None:
    """Two seeds without an interval, as JSON has no NaN, stopped the page."""
    content = comparison()
    del content["think_penalty"]
    for entry in (*content["summary"], *content["paired"]):
        entry["low"] = entry["high"] = None
        entry.update({"p_value": None} if "p_value" in entry else {})
    path = tmp_path / "compare.json"
    path.write_text(json.dumps(content))
    view = comparison_view(path)
    assert len(view.charts) == 1
    assert view.summary[0].rows[0][1] == "1.3110"
    assert view.paired.rows[0][2:] == ("−0.0480", "–", "not known")
    path.write_text("{}")
    with pytest.raises(UserError, match="has no list arms, seeds, rows, summary"):
        comparison_view(path)


def test_band_is_drawn_beside_its_points_after_thinning() -> None:
    """Errors were taken by their place after thinning, and a band lay beside another line."""
    points = [(float(i), float(i % 10)) for i in range(5000)]
    lonely = [0.0] * 5000
    points[4009] = (4009.0, 12.0)  # stays, for it is the highest of its neighbours
    lonely[4009] = 700.0

    def ticks(errors: list[float]) -> set[str]:
        return set(re.findall(r">([−\d]+)</text>", line_chart([Line("reward", points, errors=errors)], "Reward", "")))

    assert {"200", "250", "500"} & ticks(lonely), "the band reaches as far as its errors"
    assert not {"200", "250", "500"} & ticks([0.0] * 5000)


def test_stacked_layers_share_their_steps() -> None:
    """Seconds of different steps were put on top of each other."""
    with pytest.raises(ValueError, match="different x values"):
        stacked_chart([Line("a", [(1, 1.0)]), Line("b", [(2, 1.0)])], "Time", "seconds")


def test_interval_without_ends_is_a_dot() -> None:
    """A figure without an interval was left out."""
    svg = interval_chart([Interval("a", 1.0, math.nan, math.nan), Interval("b", 2.0, 1.5, 2.5)], "CE", "nats")
    assert ">a<" in svg
    assert svg.count("<use") >= 2


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (number(-0.5), "−0.5000"),
        (number(math.nan), "–"),
        (number(None), "–"),
        (interval(1.0, None, 2.0), "1.0000"),
        (with_error(0.5, math.nan), "0.5000 ± unknown"),
        (with_error(math.nan, 0.1), "–"),
        (with_error(-0.5, 0.25, "+.2f"), "−0.50 ± 0.25"),
        (scaled(4.4e15, "FLOP"), "4.4 PFLOP"),
        (scaled(999.7, ""), "1 k"),
        (scaled(0, "FLOP"), "0 FLOP"),
    ],
)
def test_numbers(found: str, text: str) -> None:
    """A missing interval was printed as [nan, nan], 999.7 as 1e+03."""
    assert found == text
