"""The examples are what a user copies from: they must run as they stand."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("script", "last_words"),
    [("look_at_decisions.py", "same program: True"), ("train_from_python.py", "nats per token")],
)
def test_example_runs(script, last_words):
    """An example that no longer fits the API is worse than none."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert last_words in done.stdout
