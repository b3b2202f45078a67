"""SIGKILL at any moment, and the same command again: nothing is lost and the result is the same to the bit."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from ra3_megatron.report.schema import curve
from tests.e2e.small import all_tensors, write_config

ROOT = Path(__file__).parents[2]
KILLS = 20


def test_twenty_sigkills_change_nothing(tmp_path):
    """Data repeated or skipped, stale Adam moments, a half-written checkpoint taken (slime#1761, NeMo-RL#4183)."""
    config = write_config(tmp_path, train={"steps": 160, "eval_interval": 40})
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.killer", str(tmp_path), str(config), str(KILLS), "5"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["killed"] == KILLS, "the run ended before it was killed often enough; make it longer"
    assert counts["in_save"] >= 3
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    results = [json.loads((run / "01-ntp" / "DONE").read_text()) for run in (whole, killed)]
    for result in results:
        assert result.pop("seconds") > 0, "wall time, the one thing that may differ"
    assert results[0] == results[1]
    assert curve(whole / "01-ntp" / "metrics.jsonl") == curve(killed / "01-ntp" / "metrics.jsonl")
    a, b = (all_tensors(run / results[0]["checkpoint"] / "dist") for run in (whole, killed))
    assert a.keys() == b.keys()
    assert any("exp_avg_sq" in key for key in a), "the optimizer's moments must be part of the comparison"
    for key, tensor in a.items():
        assert torch.equal(tensor, b[key]), key
    exported = [(run / "02-export" / "hf" / "model.safetensors").read_bytes() for run in (whole, killed)]
    assert exported[0] == exported[1]
    assert not list(killed.rglob("*.partial")), "leftovers of killed saves"
