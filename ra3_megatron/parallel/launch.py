"""Which process this is: read from torchrun's variables, from srun's, or alone."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ra3_megatron.config.errors import UserError


@dataclass(frozen=True)
class Launch:
    """Place of this process among all processes of the run."""

    rank: int
    """Number of this process, from 0."""
    world: int
    """Number of processes."""
    local_rank: int
    """Number of this process on its node."""
    local_world: int
    """Processes on this node."""
    source: str
    """Who said so: `torchrun`, `srun` or `alone`."""
    address: str | None
    """Host of rank 0; none when alone."""
    port: int | None
    """Port of rank 0's store; none when alone."""


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except KeyError:
        raise UserError(f"RANK is set but {name} is not; start with torchrun or srun, or unset RANK") from None
    except ValueError:
        raise UserError(f"{name} is '{env[name]}'; it must be a whole number") from None


def first_host(nodelist: str) -> str:
    """First host of Slurm's compressed node list: `gpu[03-05,9],x1` gives `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\])?([^,]*)", nodelist.strip())
    if match is None:
        raise UserError(f"SLURM_JOB_NODELIST is '{nodelist}'; expected host names; set MASTER_ADDR instead")
    return "".join(part or "" for part in match.groups())


def _tasks_on_node(env: Mapping[str, str], world: int) -> int:
    """Processes on this node from `SLURM_STEP_TASKS_PER_NODE`, e.g. `4(x2),3`."""
    spec = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
    if not spec:
        return world
    counts: list[int] = []
    for part in spec.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return world
        counts += [int(match.group(1))] * int(match.group(2) or 1)
    node = int(env.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else counts[-1]


def _from_slurm(env: Mapping[str, str]) -> Launch:
    rank, world = _number(env, "SLURM_PROCID"), int(env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"])
    local_world = _tasks_on_node(env, world)
    address, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if world > 1 and address is None:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
        if nodes is None:
            raise UserError(
                "srun started several processes but neither MASTER_ADDR nor SLURM_JOB_NODELIST is set; "
                "set MASTER_ADDR to the first node"
            )
        address = first_host(nodes)
    if world > 1 and port is None:
        # Every process must come to the same port without talking: the job's number gives one.
        port = str(15000 + int(env.get("SLURM_JOB_ID", "0")) % 20000)
    local_rank = int(env.get("SLURM_LOCALID", rank % local_world))
    return Launch(rank, world, local_rank, local_world, "srun", address, int(port) if port else None)


def launch_from_env(env: Mapping[str, str] | None = None) -> Launch:
    """Read rank and world size: `RANK`/`WORLD_SIZE`/... as torchrun sets them, srun's `SLURM_PROCID`/..., or alone.

    Inside a Slurm batch script itself (no srun around the command) there is one process, whatever SLURM_NTASKS says.
    Raises UserError when the variables are incomplete or contradict one another.
    """
    env = os.environ if env is None else env
    if "RANK" in env:
        rank, world = _number(env, "RANK"), _number(env, "WORLD_SIZE")
        local_world = int(env.get("LOCAL_WORLD_SIZE", world))
        local_rank = int(env.get("LOCAL_RANK", rank % local_world))
        if world > 1 and ("MASTER_ADDR" not in env or "MASTER_PORT" not in env):
            raise UserError("WORLD_SIZE > 1 but MASTER_ADDR or MASTER_PORT is missing; start with torchrun")
        port = int(env["MASTER_PORT"]) if "MASTER_PORT" in env else None
        found = Launch(rank, world, local_rank, local_world, "torchrun", env.get("MASTER_ADDR"), port)
    elif "SLURM_PROCID" in env and "SLURM_NTASKS" in env and ("SLURM_STEP_ID" in env or "SLURM_JOB_ID" not in env):
        found = _from_slurm(env)
    else:
        found = Launch(0, 1, 0, 1, "alone", None, None)
    if not 0 <= found.rank < found.world:
        raise UserError(f"rank {found.rank} does not exist in a world of {found.world}; check RANK and WORLD_SIZE")
    return found
