"""What a run asks of the cluster, and what a job is told: one list of settings, one of variables."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import atomic_write_text

RESTARTS = ("requeue", "copies")
LAUNCHERS = ("auto", "srun", "torchrun", "ft")


@dataclass(frozen=True)
class Settings:
    """Shape and conduct of the jobs of a run; nothing that names a cluster."""

    nodes: int = 1
    """Nodes of a stage that all processes share (training, E-step, RLVR, measurement)."""
    gpus_per_node: int = 8
    """GPUs asked for per node; 0 = none, for clusters of CPUs."""
    processes_per_node: int = 0
    """Training processes per node; 0 = one per GPU, one without GPUs."""
    cpus_per_process: int = 0
    """Processor cores asked for per process; 0 = the cluster's default."""
    spares: int = 0
    """Nodes allocated beyond `nodes`, to take the place of those that fail their check."""
    array: int = 1
    """Jobs that share a generation stage; each takes `array_nodes` nodes and restarts alone."""
    array_nodes: int = 0
    """Nodes of each of them; 0 = as many as one replica takes."""
    time: str = ""
    """Time limit of a job as Slurm writes it, such as 08:00:00; empty = SBATCH_TIMELIMIT or the partition's."""
    grace_s: int = 300
    """Seconds before the limit at which a job is told to save: one step, one save, and the 60 s Slurm may be early or
    late."""
    restart: str = "requeue"
    """How a job goes on after its limit or a crash: `requeue` in place, or `copies`, jobs queued behind it."""
    copies: int = 8
    """With `copies`: jobs queued for each stage that trains."""
    gpu_memory_gib: float = 0.0
    """Memory of a GPU, GiB, that the estimate is held against; 0 = it is only told."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch, word by word, such as --exclusive."""

    def __post_init__(self) -> None:
        least = {
            "nodes": 1, "gpus_per_node": 0, "processes_per_node": 0, "cpus_per_process": 0, "spares": 0, "array": 1,
            "array_nodes": 0, "grace_s": 1, "copies": 1, "gpu_memory_gib": 0,
        }  # fmt: skip
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"{name} = {getattr(self, name)}; it must be at least {value}")
        if self.restart not in RESTARTS:
            raise UserError(f"restart = {self.restart}; give one of {', '.join(RESTARTS)}")

    @property
    def processes(self) -> int:
        """Training processes per node."""
        return self.processes_per_node or self.gpus_per_node or 1

    def save(self, path: Path) -> None:
        """Write as JSON."""
        atomic_write_text(path, json.dumps(asdict(self), indent=1))


def load_settings(path: Path) -> Settings:
    """Read what `Settings.save` wrote. Raises UserError when it is not there or not that."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Settings(**{**found, "sbatch": tuple(found["sbatch"])})
    except OSError:
        raise UserError(f"no {path}; start this run with `ra3 launch CONFIG --nodes N` first") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it and launch from the configuration again") from None


@dataclass(frozen=True)
class JobVariables:
    """The variables a job reads, named once; each is `RA3_` and the field's name in capitals."""

    processes: int = 0
    """Processes per node; 0 = one per GPU of the allocation, one without."""
    spares: int = 0
    """Nodes of the allocation that only stand by."""
    launcher: str = "auto"
    """`srun` (a task per process), `torchrun`, `ft` (nvidia-resiliency-ext); `auto` = ft where its ft_launcher is on
    PATH, else srun."""
    restart: str = "requeue"
    """`requeue` or `copies`."""
    max_fruitless: int = 3
    """Attempts in a row without progress after which the job gives up."""
    max_lost: int = 10
    """The same for attempts that ended without a word: a node's death, a preemption."""
    max_restarts: int = 3
    """Restarts inside a job by torchrun or ft."""
    grace_s: float = 300.0
    """Seconds before the limit at which to save, the second net under Slurm's signal at half of it."""
    python: str = ""
    """Python of the processes; empty = the job's own, in a container `python3`."""
    container: str = ""
    """`pyxis:IMAGE` or `apptainer:IMAGE`: where the processes run; empty = on the node itself."""
    container_mounts: str = ""
    """Further folders of the container, FROM:TO with commas between them; the run, the code and the working folder are
    there anyway."""
    bad_nodes: str = ""
    """A further file of nodes to stay away from, such as one for the whole site."""
    check: str = "on"
    """`off` skips the check of the nodes."""
    check_timeout_s: float = 120.0
    """Seconds a node may take to answer it."""
    check_allreduce_gb_s: float = 0.0
    """Least bandwidth, GB/s, of an all-reduce over all processes before the start; 0 = not measured."""
    hang_poll_s: float = 1.0
    """Seconds between two looks at the heartbeat and the stop file."""

    def __post_init__(self) -> None:
        if self.launcher not in LAUNCHERS:
            raise UserError(f"RA3_LAUNCHER is '{self.launcher}'; give one of {', '.join(LAUNCHERS)}")
        if self.restart not in RESTARTS:
            raise UserError(f"RA3_RESTART is '{self.restart}'; give one of {', '.join(RESTARTS)}")


def job_variables(env: Mapping[str, str] | None = None) -> JobVariables:
    """Read the variables of a job. Raises UserError for a value of the wrong kind."""
    env = os.environ if env is None else env
    values: dict[str, Any] = {}
    for f in fields(JobVariables):
        name = f"RA3_{f.name.upper()}"
        text = env.get(name, "")
        if text:
            kind: type = type(f.default)
            try:
                values[f.name] = kind(text)
            except ValueError:
                raise UserError(f"{name} is '{text}'; it must be a number ({kind.__name__})") from None
    return JobVariables(**values)
