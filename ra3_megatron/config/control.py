"""How a job and the processes it started talk: exit codes, names of files, names of variables. No imports of weight.

The job (`ra3_megatron.launch`) runs where no torch is; the processes (`ra3_megatron.stages.interrupt`) run in a
container, perhaps. Files in a folder both see are the only thing that reaches from one to the other on every site:
torchrun turns each exit code of its workers into 1.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from ra3_megatron.config.files import atomic_write_text

EXIT_DONE = 0
"""Everything asked for is done."""
EXIT_CRASH = 1
"""A bug or a fault of the machine, with a traceback."""
EXIT_USER = 2
"""An error the user can cure; starting again without a change is useless."""
EXIT_GO_ON = 85
"""Asked to make way: state is saved, and the same command goes on."""
EXIT_STOPPED = 86
"""The user's stop file was seen: state is saved, nobody shall go on by himself."""
EXIT_NO_PROGRESS = 93
"""Several attempts in a row brought nothing forward; the job gives up, and with it what waits for it."""

STOP_FILE = "STOP"
"""In the run's folder: every process of the run saves and ends, and no job of it starts."""
REQUEST_FILE = "save-and-go-on"
"""In the attempt's folder: its processes save and end; the text is the reason."""
HEARTBEAT_FILE = "heartbeat.json"
"""In the attempt's folder: what the main process last did, and within how many seconds it will be heard of again."""
OUTCOME_FILE = "outcome.json"
"""In the attempt's folder: why the processes ended, where they could say it."""
STRAGGLERS_FILE = "stragglers.json"
"""In the attempt's folder: nodes that were slower than the others, and by how much."""
STARTUP_FILE = "startup.json"
"""In the attempt's folder: moments of the main process up to its first step, seconds since 1970."""
RANKS_FOLDER = "ranks"
"""In the attempt's folder: a file per rank with its host and process number, for whoever wants to see its stack."""
PARTS_FOLDER = "parts"
"""In a generation stage's folder: which jobs of its array have made all their shards."""

ATTEMPT_DIR = "RA3_ATTEMPT_DIR"
"""Variable: the folder of this attempt; unset outside of a job."""
MUST_SAVE_BY = "RA3_MUST_SAVE_BY"
"""Variable: moment, in seconds since 1970, at which to save and end; for limits that send no signal."""
SETUP_LIMIT = "RA3_HANG_SETUP_S"
"""Variable: seconds a stage may take from its start to its first step before it counts as hung."""
STEP_LIMIT = "RA3_HANG_STEP_S"
"""Variable: least seconds without a step that count as a hang; more when steps are long."""
STRAGGLER_INTERVAL = "RA3_STRAGGLER_S"
"""Variable: seconds between measurements of every process's speed; 0 = never."""
CODE_COMMIT = "RA3_CODE_COMMIT"
"""Variable: commit of the snapshot of the code that runs, for the record."""


class Interrupted(Exception):
    """A stage saved and left because it was asked to; `code` is the exit code the process ends with."""

    def __init__(self, reason: str, code: int = EXIT_GO_ON) -> None:
        super().__init__(reason)
        self.reason, self.code = reason, code


def part_name(number: int, count: int) -> str:
    """Name of the marker of job `number` (from 0) of an array of `count`."""
    return f"{number:04d}-of-{count:04d}.done"


def process_start() -> float:
    """When this process was started, seconds since 1970, to a hundredth; Linux only.

    `exec` changes nothing about it. By the kernel's own clock: the time of booting is known to a second only.
    """
    with open("/proc/self/stat", encoding="utf-8") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def attempt_dir() -> Path | None:
    """The folder of this attempt, when a job of ours started the process."""
    value = os.environ.get(ATTEMPT_DIR)
    return Path(value) if value else None


def exit_code(code: int) -> int:
    """What the process leaves with: under a launcher that starts failed processes again, words instead of a code."""
    elastic = "TORCHELASTIC_RUN_ID" in os.environ and attempt_dir() is not None
    return EXIT_DONE if elastic and code != EXIT_CRASH else code


def write_outcome(code: int, reason: str, first: bool = False) -> None:
    """Leave word why this process ends; nothing outside of a job, or when the folder cannot be written.

    `first`: say nothing when another has spoken.
    """
    folder = attempt_dir()
    if folder is None or (first and (folder / OUTCOME_FILE).exists()):
        return
    text = " ".join(reason.split())[:500]
    try:
        atomic_write_text(folder / OUTCOME_FILE, json.dumps({"code": code, "reason": text}))
    except OSError:
        return  # a full disk may be the very reason; the exit code still tells


def read_json(path: Path) -> dict[str, Any] | None:
    """Content of a JSON file that another process replaces now and then; none when it is not there or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
