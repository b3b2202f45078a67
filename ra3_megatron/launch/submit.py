"""Submission of a run's jobs: what is not DONE and not in the queue yet, with what it waits for."""

import hashlib
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ra3_megatron.config.control import CODE_COMMIT, STOP_FILE
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import is_done
from ra3_megatron.config.run import RunConfig
from ra3_megatron.launch.folder import JOBS, PROJECT, LaunchFolder
from ra3_megatron.launch.plan import JobSpec, plan
from ra3_megatron.launch.settings import Settings
from ra3_megatron.launch.slurm import Queued, clean_environment, command, queue


@dataclass(frozen=True)
class Submitted:
    """What became of a job of the plan."""

    spec: JobSpec
    """The job."""
    state: str
    """`done`, `queued` (by an earlier launch), `submitted`, or `planned` in a dry run."""
    ids: tuple[str, ...]
    """Numbers of the job and its copies; empty when done."""
    commands: tuple[str, ...]
    """How it is submitted, as one would type it."""


def job_name(run: Path, spec: JobSpec) -> str:
    """Name in the queue: the run's, told apart by its path, and the job's."""
    mark = hashlib.sha256(str(run).encode()).hexdigest()[:6]
    return f"{run.name}-{mark}:{spec.name}"


def environment(folder: LaunchFolder, settings: Settings) -> dict[str, str]:
    """What the jobs get: this shell's variables without secrets, and what they are told."""
    return {
        **clean_environment(),
        PROJECT: str(folder.code),
        "RA3_HOST_PYTHON": sys.executable,
        "RA3_RESTART": settings.restart,
        "RA3_GRACE_S": str(settings.grace_s),
        CODE_COMMIT: folder.commit(),
    }


def sbatch_command(
    folder: LaunchFolder, spec: JobSpec, settings: Settings, after: Sequence[str], kind: str = "afterok"
) -> list[str]:
    """One call of sbatch. `after` are numbers of jobs; nothing in it names a cluster."""
    log = folder.run / JOBS / spec.name / ("slurm-%A_%a.log" if spec.array else "slurm-%j.log")
    arguments = [
        "sbatch",
        "--parsable",
        f"--job-name={job_name(folder.run, spec)}",
        f"--output={log}",
        "--open-mode=append",
        "--requeue" if settings.restart == "requeue" else "--no-requeue",
        f"--signal=B:USR1@{settings.grace_s}",
        f"--nodes={spec.nodes + spec.spares}",
        f"--ntasks-per-node={spec.processes}",
    ]
    arguments += [f"--gpus-per-node={spec.gpus}"] if spec.gpus else []
    arguments += [f"--cpus-per-task={settings.cpus_per_process}"] if settings.cpus_per_process else []
    arguments += [f"--time={settings.time}"] if settings.time else []
    arguments += [f"--array=0-{spec.array - 1}"] if spec.array else []
    if after:
        arguments += [f"--dependency={kind}:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
    # Values go by the environment: --export cuts them at commas.
    arguments += [f"--chdir={Path.cwd()}", *settings.sbatch]
    return [*arguments, str(folder.code / "slurm" / spec.script), str(folder.run), *spec.arguments,
            *(["--join"] if spec.name.endswith("-join") else [])]  # fmt: skip


def submit(config: RunConfig, folder: LaunchFolder, settings: Settings, dry_run: bool) -> list[Submitted]:
    """Submit every job that is neither done nor queued; with `dry_run` only say how. Safe to repeat.

    Raises UserError when sbatch refuses; jobs submitted until then stay, and the next call goes on behind them.
    """
    if (folder.run / STOP_FILE).exists() and not dry_run:
        raise UserError(f"{folder.run / STOP_FILE} is there; slurm/resume.sh {folder.run} removes it and goes on")
    waiting = {} if dry_run and not _slurm_is_there() else queue()
    made: dict[str, Submitted] = {}
    for spec in plan(config, settings):
        made[spec.name] = _one(folder, spec, settings, made, waiting, dry_run)
    return list(made.values())


def _slurm_is_there() -> bool:
    try:
        command(["sinfo", "--version"])
    except UserError:
        return False
    return True


def _one(
    folder: LaunchFolder,
    spec: JobSpec,
    settings: Settings,
    made: dict[str, Submitted],
    waiting: dict[str, list[Queued]],
    dry_run: bool,
) -> Submitted:
    if is_done(folder.run / spec.stage):
        return Submitted(spec, "done", (), ())
    if known := waiting.get(job_name(folder.run, spec)):
        return Submitted(spec, "queued", tuple(dict.fromkeys(q.job for q in known)), ())
    after = [made[name].ids[-1] for name in spec.after if made[name].ids]
    copies = settings.copies if settings.restart == "copies" else 1
    kind = "afterok" if settings.restart == "requeue" else "afterany"
    ids: list[str] = []
    commands = []
    variables = {**environment(folder, settings), "RA3_SPARES": str(spec.spares), "RA3_PROCESSES": str(spec.processes)}
    for copy in range(copies):
        arguments = sbatch_command(folder, spec, settings, ids[-1:] or after, "afterany" if copy else kind)
        commands.append(shlex.join(arguments))
        if dry_run:
            ids.append(f"<{spec.name}{f'.{copy + 1}' if copies > 1 else ''}>")
            continue
        (folder.run / JOBS / spec.name).mkdir(parents=True, exist_ok=True)
        ids.append(command(arguments, variables).strip().split(";")[0])
    return Submitted(spec, "planned" if dry_run else "submitted", tuple(ids), tuple(commands))


def inherited() -> dict[str, str]:
    """Account, partition and quality of service of the job this runs in, as variables that sbatch reads."""
    pairs = {"SBATCH_ACCOUNT": "SLURM_JOB_ACCOUNT", "SBATCH_PARTITION": "SLURM_JOB_PARTITION",
             "SBATCH_QOS": "SLURM_JOB_QOS"}  # fmt: skip
    return {
        ours: os.environ[theirs] for ours, theirs in pairs.items() if os.environ.get(theirs) and ours not in os.environ
    }
