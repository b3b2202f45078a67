"""Runs `triton_cases.py` in a process of its own: Triton must know that it interprets before it is first imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels of a GPU need triton, which comes with torch's CUDA builds")


def test_kernels_interpreted() -> None:
    """See the docstrings in the file; its output is shown when one of its tests fails."""
    cases = Path(__file__).with_name("triton_cases.py")
    root = Path(__file__).parents[3]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
