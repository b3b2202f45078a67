"""Where the time from a job's start to its first step goes."""

import json
import subprocess
import sys
import time

from ra3_megatron.config.control import STARTUP_FILE
from ra3_megatron.launch.startup import in_words, moment_of, seconds_of

MOMENTS = {"script": 101.0, "job": 102.0, "checked": 104.5}
PROCESSES = {"started": 105.0, "imported": 110.0, "joined": 111.5, "stepped": 115.0}


def test_the_parts_add_up(tmp_path):
    """The first step was counted from the end of the check: half a minute of every start was nobody's."""
    assert seconds_of(100.0, MOMENTS, tmp_path) == {}, "no step yet"
    (tmp_path / STARTUP_FILE).write_text(json.dumps(PROCESSES))
    seconds = seconds_of(100.0, MOMENTS, tmp_path)
    assert seconds == {
        "first step": 15.0, "Slurm's part": 1.0, "start of the job": 1.0, "check of the nodes": 2.5, "srun": 0.5,
        "imports": 5.0, "process groups": 1.5, "model, data and first step": 3.5,
    }  # fmt: skip
    assert sum(seconds.values()) == 2 * seconds["first step"]
    assert seconds_of(None, MOMENTS, tmp_path)["first step"] == 14.0, "Slurm says nothing: from the script on"
    assert in_words(seconds).startswith("first step 15.0 s after the start of the job: Slurm's part 1.0, start of")


def test_moments(monkeypatch):
    """A job without a limit, whose end is Unknown, failed to start."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    assert moment_of("1970-01-01T00:01:05") == 65.0
    assert moment_of("Unknown") is None
    assert moment_of("") is None


def test_start_of_a_process():
    """By the second of booting a process was started before its job."""
    before = time.time()
    code = "from ra3_megatron.config.control import process_start; print(process_start())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert before - 0.02 <= float(done.stdout) <= time.time()
