"""A profile as people read it, out of a hand-made `profile.json`."""

import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from ra3_megatron.config.errors import UserError
from ra3_megatron.report.charts import Bar, bar_chart
from ra3_megatron.report.op_kinds import COMMUNICATION, GEMM, KINDS
from ra3_megatron.report.profile_view import build_profile_page, operation_rows, phase_rows, print_profile


def phase(name: str, seconds: float, within: str = "") -> dict[str, Any]:
    return {"name": name, "within": within, "seconds": seconds, "calls": 1, "peak": 3 << 30, "held": 2 << 30}


PROFILE: dict[str, Any] = {
    "stage": "ra3-sft-1",
    "model": {"parameters": 1000, "precision": "bf16", "weights": "random", "layers": "torch layers"},
    "device": "NVIDIA H200", "threads": None, "steps": 2, "step_seconds": 2.0,
    "layout": {"tensor": 2, "pipeline": 2, "context": 1, "data": 1},
    "speed": {"flops": 1e12, "bytes": 1e11, "matrix": 8192},
    "chip": {"name": "H200 SXM", "bf16": 1e15, "fp8": None},
    "network_bytes_per_second": {"tp": 1e10},
    "work_per_step": {"trained": 4096.0, "scored": 0.0, "rolled_out": 0.0, "forward_passes": 0.0, "updates": 1.0},
    "flops_per_step": 1e12,
    "utilisation": {"flops_per_second_and_rank": 5e11, "of_measured": 0.5, "of_bf16_peak": 0.0005},
    "utilisation_of_update": {"flops_per_second_and_rank": 5e11, "of_measured": 0.625},
    "floors": [
        {"phase": "update/forward and backward", "seconds": 0.5, "what": "1e12 FLOP"},
        {"phase": "communication of tensor parallelism", "seconds": 0.1, "what": "1e9 bytes"},
    ],
    "checkpoint_interval": 10,
    "phases": [phase("update", 1.6), phase("forward and backward", 1.5, "update"), phase("other", 0.4)],
    "memory": [{"seconds": 1.0, "phase": "update", "held": 2 << 30, "peak": 3 << 30}],
    "peak_memory": 3 << 30,
    "save": {"stall_seconds": 0.5, "seconds": 4.0},
    "trace": {
        "parts": [
            {"phase": "update/forward and backward", "kind": GEMM, "seconds": 1.2, "count": 7},
            {"phase": "update/forward and backward", "kind": COMMUNICATION, "seconds": 0.3, "count": 2},
            {"phase": "other", "kind": GEMM, "seconds": 1e-5, "count": 1},
        ],
        "communication": 0.4, "exposed": 0.1, "top": [["aten::mm <script>", 1.2, 7]], "step_seconds": 2.5, "steps": 1,
    },
    "ranks": {"step_seconds": [2.0, 2.1, 1.9, 2.0], "peak_memory": [1 << 30, 3 << 30, 1 << 30, 1 << 30]},
}  # fmt: skip


def test_phases_stand_beside_their_floors() -> None:
    """A floor without a phase of its own (communication lies inside the update) fell out of the table."""
    head, rows = phase_rows(PROFILE)
    table = {row[0].strip("\N{NO-BREAK SPACE}"): dict(zip(head, row, strict=True)) for row in rows}
    assert table["forward and backward"]["× floor"] == "3.00×"
    assert table["update"]["share"] == "80.0%"
    assert table["update"]["× floor"] == "–"
    assert table["communication of tensor parallelism"]["floor"] == "100 ms"


def test_operations_of_no_weight_are_left_out() -> None:
    """Forty rows of microseconds hid the three that mattered."""
    found = operation_rows(PROFILE)
    assert found is not None
    assert [row[1] for row in found[1]] == [GEMM, COMMUNICATION]
    assert operation_rows({**PROFILE, "trace": None}) is None


def test_page_and_terminal_say_the_same(tmp_path: Path) -> None:
    """The page was built from other figures than the table; a kernel's name with brackets became an element of it."""
    (tmp_path / "profile.json").write_text(json.dumps(PROFILE))
    page = build_profile_page(tmp_path).read_text(encoding="utf-8")
    out = io.StringIO()
    print_profile(PROFILE, Console(file=out, width=200))
    for text in ("3.00×", "one every 10 steps is 50 ms a step", "25% of it is exposed", "1.9 s to 2.1 s", "pipeline"):
        assert text in page, text
        assert text in out.getvalue(), text
    assert "<script>" not in page
    assert "H200 SXM" in page
    with pytest.raises(UserError, match="no profile"):
        build_profile_page(tmp_path / "nowhere")


def test_a_run_without_trace_or_save_has_a_page(tmp_path: Path) -> None:
    """`--traced 0 --no-save` ended in a template error."""
    used = {"flops_per_second_and_rank": 5e11, "of_measured": 0.5}
    bare = {**PROFILE, "trace": None, "save": None, "memory": [], "chip": None, "utilisation": used, "threads": 4}
    (tmp_path / "profile.json").write_text(json.dumps({**bare, "floors": [], "utilisation_of_update": None}))
    assert "ra3-sft-1" in build_profile_page(tmp_path).read_text(encoding="utf-8")


def test_bars_of_more_parts_than_colours_are_told_apart() -> None:
    """The seventh part had the first one's colour."""
    svg = bar_chart([Bar("a", dict.fromkeys(KINDS, 1.0)), Bar("b", {GEMM: 2.0})], "Kinds", "seconds")
    tree = ElementTree.fromstring(svg)
    texts = {"".join(e.itertext()).strip() for e in tree.iter() if e.tag.endswith("text")}
    assert set(KINDS) <= texts
    assert {"a", "b"} <= texts
    assert any(e.tag.endswith("pattern") for e in tree.iter())
