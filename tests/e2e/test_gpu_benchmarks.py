"""The GPU benchmarks in their tiny form, on a CPU: they must not be found broken on the GPU machine."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.e2e.forked import ROOT, ForkServer


def run_script(name: str, arguments: list[str]) -> None:
    """A benchmark as `python benchmarks/NAME ARGUMENTS` runs it, in this process."""
    folder = ROOT / "benchmarks"
    sys.path.insert(0, str(folder))
    sys.argv = [name, *arguments]
    runpy.run_path(str(folder / name), run_name="__main__")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gpu_smoke.py", {"local-bf16"}),
        ("gpu_training.py", {"tiny seq 64 local-bf16: tokens/s", "matrix product"}),
        ("gpu_rollout.py", {"tiny local-fp32: generation", "tiny local-fp32: largest log-prob gap"}),
        ("gpu_memory.py", set()),
        ("gpu_estep.py", {"tiny local-fp32: E-step"}),
    ],
)
def test_tiny_form(name: str, says: set[str], server: ForkServer, tmp_path: Path) -> None:
    """A signature changed, and nobody ran what only a GPU machine runs."""
    path = tmp_path / "results.json"
    arguments = {"name": name, "arguments": ["--tiny", "--results", str(path)]}
    server.call("tests.e2e.test_gpu_benchmarks:run_script", arguments)
    rows = json.loads(path.read_text())
    assert rows
    assert not [r for r in rows if r["note"].startswith("FAILED")]
    found = {r["case"] for r in rows if r["value"] is not None}
    assert says <= found
    # What this machine cannot do is said, and never a figure.
    assert all(r["note"].startswith("NOT RUN") for r in rows if r["value"] is None)


def test_without_a_gpu_nothing_is_reckoned(server: ForkServer, tmp_path: Path) -> None:
    """Figures of a CPU under the heading of a GPU."""
    path = tmp_path / "results.json"
    server.call("tests.e2e.test_gpu_benchmarks:run_script",
                {"name": "gpu_training.py", "arguments": ["--results", str(path)]})  # fmt: skip
    [row] = json.loads(path.read_text())
    assert row["value"] is None
    assert row["note"].startswith("NOT RUN: no GPU")
