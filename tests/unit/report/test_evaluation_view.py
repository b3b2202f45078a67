"""The evaluation on a page: figures, differences, failures, and files that are damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.report.evaluation_view import evaluation_view, write_evaluation_page


def rate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05}


def figures(value: float, **more: Any) -> dict[str, Any]:
    return {
        "problems": 164, "answers": 164, "lost": 1, "pass_at": {"1": rate(value)}, "sampling_error": None,
        "visible": rate(0.5), "hidden": None, "outcomes": {"passed": 40, "wrong": 124}, "notes": {"no code": 3},
        "cut_off": 0.25, "per_task": {}, **more,
    }  # fmt: skip


RESULTS = {
    "mode": "strict",
    "settings": {"samples": 1, "limit": None},
    "sets": {"humaneval": {"source": "/d/HumanEval.jsonl.gz", "fingerprint": "f", "problems": 164, "dropped": {}}},
    "models": {
        "base": {"benchmarks": {"humaneval": figures(0.2)}},
        "ra3": {"benchmarks": {"humaneval": figures(0.3, ratings={"800-1199": rate(0.4), "unrated": rate(0.1)})}},
    },
    "paired": {
        "ra3": {
            "humaneval": {
                "against": "base", "difference": 0.1, "low": 0.02, "high": 0.18, "p_value": 0.01, "problems": 164,
                "better": 20, "worse": 4,
            }
        }
    },
    "method": "how it was measured", "contamination": "may hold these problems",
}  # fmt: skip
FAILURE = {
    "model": "ra3", "benchmark": "humaneval", "task": "HumanEval/1", "prompt": "def f():", "program": "<script>x",
    "outcome": "wrong", "message": "2 is not 3", "passed": 1, "total": 4, "finish": "stop", "notes": ["no code"],
}  # fmt: skip


def written(folder: Path, results: Any = RESULTS) -> Path:
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "failures.json").write_text(json.dumps([FAILURE]))
    return folder


def test_the_view_says_what_was_measured(tmp_path: Path) -> None:
    """Figures of one model under the name of another; percent that were shares."""
    view = evaluation_view(written(tmp_path))
    assert view is not None
    assert [row[0] for row in view.table.rows] == ["humaneval, base", "humaneval, ra3"]
    assert view.table.rows[1][1] == "30.0 [25.0, 35.0]"
    assert view.paired is not None
    assert view.paired.rows[0][2] == "+10.0 [+2.0, +18.0]"
    assert view.paired.rows[0][-1] == "higher than base"
    assert view.buckets is not None
    assert view.groups[0].failed == 124
    assert len(view.charts) == 2


def test_the_page_shows_failures_and_escapes_programs(tmp_path: Path) -> None:
    """A program of the model ran in the reader's browser."""
    page = write_evaluation_page(written(tmp_path), tmp_path / "page.html", {"judge": {}}).read_text()
    assert "&lt;script&gt;x" in page
    assert "<script>x" not in page
    assert "HumanEval/1: wrong, 1 of 4 tests" in page
    assert "may hold these problems" in page


def test_no_results_and_damaged_ones(tmp_path: Path) -> None:
    """A stage that has not ended has no view; a damaged file is named."""
    assert evaluation_view(tmp_path) is None
    with pytest.raises(UserError, match=r"results\.json lacks a field"):
        evaluation_view(written(tmp_path, {"models": {}}))
