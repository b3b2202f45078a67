"""Context parallelism through Transformer Engine; needs two GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(processes: int, precision: str) -> list[float]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, "-m", "tests.gpu.context_parallel_worker", str(processes), precision]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("LOSSES")]
    return [float(x) for x in line.split()[1:]]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_two_processes_equal_one(te, precision):
    """Boundaries that Transformer Engine takes for those of a shard, or padded ones it insists on and does not get."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} GPU; context parallelism needs two")
    assert run(2, precision) == pytest.approx(run(1, precision), rel=2e-3)
