"""Slurm's commands, each with a deadline, and what of their output is used."""

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ra3_megatron.config.control import ATTEMPT_DIR, MUST_SAVE_BY
from ra3_megatron.config.errors import UserError

PATIENCE_S = 60.0
"""Deadline of a command of Slurm, seconds; a busy controller answers late."""

PERSISTENCE_S = 600.0
"""How long a job tries a command again, seconds: a controller that is restarted is away for minutes."""

KEPT = ("SLURM_CONF", "SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_QOS", "SBATCH_RESERVATION", "SBATCH_CONSTRAINT",
        "SBATCH_CLUSTERS", "SBATCH_TIMELIMIT", "SBATCH_EXCLUSIVE", "SBATCH_GRES_FLAGS")  # fmt: skip
"""Variables of Slurm that a submission from inside a job hands on; the others describe the outer job."""

_AWAY = re.compile(r"Unable to contact|did not answer|timed out|connect failure|Connection refused|Zero Bytes", re.I)
"""What is said when the controller cannot be reached, in contrast to what it refuses."""

_SECRET = re.compile(
    r"secret|passw(or)?d|api_?key|access_?key|credential|(^|_)token$|^aws_|private_?key", re.IGNORECASE
)
_OUTER = re.compile(rf"^(SLURM_|SLURMD_|SBATCH_|SRUN_|SALLOC_|PMI_|PMIX_)|^({ATTEMPT_DIR}|{MUST_SAVE_BY})$")


def command(arguments: Sequence[str], env: Mapping[str, str] | None = None, seconds: float = PATIENCE_S) -> str:
    """Standard output of a command of Slurm. Raises UserError when it is missing, fails, or does not answer in time."""
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, timeout=seconds, check=False, env=env, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise UserError(f"no command {arguments[0]}; log in to a node of a Slurm cluster, or use --dry-run") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{arguments[0]} did not answer within {seconds:.0f} s; try again later") from None
    if done.returncode:
        text = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"{' '.join(arguments)} failed: {text}")
    return done.stdout


def persistently(arguments: Sequence[str], pause_s: float = 5.0) -> str:
    """As `command`, tried again while the controller is away. Raises UserError after `PERSISTENCE_S`, or if refused."""
    end = time.monotonic() + PERSISTENCE_S
    while True:
        try:
            return command(arguments)
        except UserError as error:
            if time.monotonic() > end or not _AWAY.search(str(error)):
                raise
            print(f"{error}; tried again in {pause_s:.0f} s", flush=True)
            time.sleep(pause_s)


def clean_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment a job is submitted with: no secrets, which Slurm would keep, and nothing of an outer job."""
    env = os.environ if env is None else env
    return {
        name: value for name, value in env.items() if name in KEPT or not (_OUTER.search(name) or _SECRET.search(name))
    }


@dataclass(frozen=True)
class Queued:
    """A job in the queue, or an array."""

    job: str
    """Number; of an array, that of the whole."""
    state: str
    """Such as RUNNING."""
    reason: str
    """Why it waits, or where it runs."""


def queue() -> dict[str, list[Queued]]:
    """This user's jobs that have not ended, by job name."""
    found: dict[str, list[Queued]] = {}
    for line in command(["squeue", "--me", "--noheader", "--format=%F|%T|%R|%j"]).splitlines():
        job, state, reason, name = line.strip().split("|", 3)
        if state not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"):
            found.setdefault(name, []).append(Queued(job, state, reason))
    return found


def hostnames(nodelist: str) -> list[str]:
    """`gpu[03-05]` as single names."""
    return command(["scontrol", "show", "hostnames", nodelist]).split()


def job_facts(job: str) -> dict[str, str]:
    """What the controller knows of a job: `EndTime`, `Reason`, `Command`, and so on. Of an array: one element."""
    text = persistently(["scontrol", "show", "job", "--oneliner", job])
    # An array's last element has the array's own number, which prints all elements.
    lines = [line for line in text.splitlines() if line.startswith(f"JobId={job} ")] or text.splitlines()[:1]
    return dict(re.findall(r"(\S+?)=(\S*)", lines[0])) if lines else {}


def own_id(env: Mapping[str, str] | None = None) -> str:
    """Name of this job for scontrol and scancel; an element's own and never the array's."""
    env = os.environ if env is None else env
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]
