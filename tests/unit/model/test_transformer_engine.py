"""The cases of `tests/fake_te`, in a process of its own: Megatron-Core looks for Transformer Engine when imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FAKE = ROOT / "tests" / "fake_te"


CASES = ["model_cases.py", "training_cases.py", "checkpoint_cases.py", "rollout_cases.py", "expert_cases.py"]


@pytest.mark.parametrize("cases", CASES)
def test_with_a_stand_in_for_transformer_engine(cases: str) -> None:
    """See the docstrings in the file; its output is shown when one of its tests fails."""
    path = os.pathsep.join([str(FAKE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FAKE / cases)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
