"""The command that starts a job's processes: srun, torchrun or nvidia-resiliency-ext, on the node or in a container."""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ra3_megatron.config.errors import UserError
from ra3_megatron.launch.settings import JobVariables


@dataclass(frozen=True)
class Step:
    """Where processes are started, and how many."""

    nodes: tuple[str, ...]
    """Nodes, the first of which serves the store."""
    processes: int
    """Processes per node."""
    port: int
    """Port of the store."""
    attempt: Path
    """Folder of the attempt: logs of the nodes."""
    mounts: tuple[Path, ...]
    """Folders a container must see."""


def port_of(job_id: int, restart: int) -> int:
    """A port below the range that kernels hand out, another for each of the jobs that may share a node.

    An attempt takes the next one: what an earlier one left in the kernel is not in the way.
    """
    return 12000 + (job_id * 7 + restart) % 20000


def start_command(step: Step, variables: JobVariables, arguments: Sequence[str]) -> list[str]:
    """srun with everything behind it; `arguments` go to `python -m`."""
    launcher = choose_launcher(variables)
    tasks = step.processes if launcher == "srun" else 1
    flags, prefix = container(variables, step.mounts)
    command = ["srun", *_placed(step.nodes, tasks), "--input=none", "--label", f"--output={step.attempt}/node%n.log",
               # The cluster's default lets the others run on when one has died.
               "--kill-on-bad-exit=1", "--wait=60", *flags, *prefix]  # fmt: skip
    return [*command, *_program(launcher, step, variables, prefix or flags), *arguments]


def beside_command(step: Step, arguments: Sequence[str]) -> list[str]:
    """srun of one task per node next to the processes that run, outside of a container."""
    return ["srun", *_placed(step.nodes, 1), "--input=none", "--overlap", *arguments]


def _placed(nodes: Sequence[str], tasks: int) -> list[str]:
    return [f"--nodes={len(nodes)}", f"--ntasks={len(nodes) * tasks}", f"--ntasks-per-node={tasks}",
            f"--nodelist={','.join(nodes)}"]  # fmt: skip


def choose_launcher(variables: JobVariables) -> str:
    """`srun`, `torchrun` or `ft`. Raises UserError for `ft` without nvidia-resiliency-ext."""
    there = shutil.which("ft_launcher") is not None
    if variables.launcher == "auto":
        return "ft" if there and not variables.container else "srun"
    if variables.launcher == "ft" and not (there or variables.container):
        raise UserError("RA3_LAUNCHER=ft and no ft_launcher on PATH; pip install nvidia-resiliency-ext, or set srun")
    return variables.launcher


def _program(launcher: str, step: Step, variables: JobVariables, contained: Sequence[str]) -> list[str]:
    python = variables.python or ("python3" if contained else sys.executable)
    if launcher == "srun":
        return [python, "-m"]
    command = ["ft_launcher"] if launcher == "ft" else [python, "-m", "torch.distributed.run"]
    return [
        *command,
        f"--nnodes={len(step.nodes)}",
        f"--nproc-per-node={step.processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={step.nodes[0]}:{step.port}",
        f"--rdzv-id={step.attempt.name}",
        f"--max-restarts={variables.max_restarts}",
        "-m",
    ]


def container(variables: JobVariables, mounts: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Options of srun (pyxis) and a prefix of the command (apptainer); both empty without a container.

    Raises UserError for a container of another kind.
    """
    if not variables.container:
        return [], []
    kind, _, image = variables.container.partition(":")
    pairs = [f"{path}:{path}" for path in dict.fromkeys(mounts)]
    pairs += [pair for pair in variables.container_mounts.split(",") if pair]
    if kind == "pyxis" and image:
        return [f"--container-image={image}", f"--container-mounts={','.join(pairs)}",
                f"--container-workdir={Path.cwd()}", "--no-container-mount-home"], []  # fmt: skip
    if kind == "apptainer" and image:
        binds = [part for pair in pairs for part in ("--bind", pair)]
        return [], ["apptainer", "exec", "--nv", *binds, "--pwd", str(Path.cwd()), image]
    raise UserError(f"RA3_CONTAINER is '{variables.container}'; give pyxis:IMAGE or apptainer:IMAGE")


def process_environment(step: Step, launcher: str) -> dict[str, str]:
    """What the processes find in their environment beyond the job's own."""
    env = dict(os.environ)
    if launcher == "srun":
        env |= {"MASTER_ADDR": step.nodes[0], "MASTER_PORT": str(step.port)}
    else:
        # A store of its own for every restart: in a shared one the processes meet what their dead predecessors left,
        # and the nodes count restarts differently.
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if env.get("SLURM_CPUS_PER_TASK"):
        # From 22.05 on srun does not take it from sbatch by itself.
        env["SRUN_CPUS_PER_TASK"] = env["SLURM_CPUS_PER_TASK"]
    return env
