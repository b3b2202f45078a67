"""`ra3 profile` from the command a user types: every stage that trains, one process and two."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import rl, small
from tests.e2e.forked import ForkServer

COUNTS = ["--steps", "2", "--warm-up", "1", "--traced", "1"]
THINKING = {
    "run": {"arms": ["ra3"]},
    "base": {"tokens": 1024},
    "latent": {"max_latent_tokens": 4, "max_batch": 8},
    "variational": {"steps": 2, "snippets_per_step": 4, "group_size": 2, "probe_snippets": 2},
    "data": {"snippet_tokens": 96},
}


def profiled(server: ForkServer, *arguments: str, world: int = 1) -> dict[str, Any]:
    """Figures of the one profile that the command left in `--out`."""
    done = server.cli(["profile", *arguments, *COUNTS], world=world)
    assert all(d.code == 0 for d in done), done[0].err[-3000:]
    folder = Path(arguments[arguments.index("--out") + 1])
    assert not (folder / "work").exists(), "the stage's own folder is left behind"
    assert "<svg" in (folder / "profile.html").read_text()
    for rank in range(world):
        trace = json.loads(gzip.decompress((folder / f"trace-rank{rank}.json.gz").read_bytes()))
        assert any(e.get("name") == "ra3: update" for e in trace["traceEvents"])
    found = json.loads((folder / "profile.json").read_text())
    assert found["steps"] == 2
    outer = [p for p in found["phases"] if not p["within"]]
    # Phases and what is left over are the whole step, whatever the machine does meanwhile.
    assert sum(p["seconds"] for p in outer) == pytest.approx(found["step_seconds"], rel=1e-3)
    assert found["trace"]["parts"]
    assert found["save"]["seconds"] >= found["save"]["stall_seconds"] > 0
    return found


def phases(found: dict[str, Any]) -> set[str]:
    return {f"{p['within']}/{p['name']}" if p["within"] else p["name"] for p in found["phases"]}


def listing(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_next_token_prediction_on_two_processes(base: Path, server: ForkServer, tmp_path: Path) -> None:
    """A profile that trained in the run's own folder, and one that saw no communication between replicas."""
    before = listing(base / "run")
    out = tmp_path / "profile"
    found = profiled(server, str(base / "config.yaml"), "train.steps=3", "train.eval_interval=0", "--out", str(out),
                     world=2)  # fmt: skip
    assert listing(base / "run") == before
    assert phases(found) >= {"data", "update/forward and backward", "update/gradient norm", "update/optimizer", "other"}
    assert found["work_per_step"]["trained"] == 8 * 128
    assert found["work_per_step"]["updates"] == 1
    assert len(found["ranks"]["step_seconds"]) == 2
    assert found["trace"]["communication"] >= found["trace"]["exposed"] > 0
    assert {f["phase"] for f in found["floors"]} >= {"communication of replicas", "update/optimizer"}


def test_e_step_of_a_run_that_has_not_begun(server: ForkServer, tmp_path: Path) -> None:
    """Nothing is there yet: the corpus is prepared in the profile's folder, and the weights are said to be random."""
    config = small.write_config(tmp_path, **THINKING)
    found = profiled(server, str(config), "--stage", "variational", "--out", str(tmp_path / "profile"))
    assert not (tmp_path / "run").exists()
    assert phases(found) >= {"rollout", "score", "data", "update"}
    assert found["model"]["weights"].startswith("random")
    work = found["work_per_step"]
    assert work["trained"] > 0
    assert work["rolled_out"] > 0
    assert work["scored"] > 0
    assert {f["phase"] for f in found["floors"]} >= {"rollout", "score", "update/optimizer"}


def test_rlvr_from_a_finished_run(base: Path, server: ForkServer, tmp_path: Path) -> None:
    """Judging was inside the rollouts' time, and answers of random weights said nothing about real ones."""
    rl.write_tasks(tmp_path / "tasks.jsonl")
    config = rl.write_config(tmp_path, base, rlvr={"max_lag": 0})
    found = profiled(server, str(config), "run.arms=[]", "--stage", "rlvr", "--out", str(tmp_path / "profile"))
    assert phases(found) >= {"rollout", "judge", "data", "update"}
    assert str(base / "run") in found["model"]["weights"]
    assert found["work_per_step"]["updates"] == 2  # minibatches


def test_what_cannot_be_profiled_is_refused(base: Path, server: ForkServer) -> None:
    """`--stage generate` trained nothing and ended in an attribute error."""
    for arguments, text in ((["--stage", "prepare"], "cannot be profiled"), (["--nsys"], "needs a GPU")):
        (done,) = server.cli(["profile", str(base / "config.yaml"), "train.steps=3", *arguments])
        assert done.code == 2
        assert text in done.err
