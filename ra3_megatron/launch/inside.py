"""What the scripts in `slurm/` call in their job: one stage, or the submission of the whole chain."""

import os
from dataclasses import replace
from pathlib import Path

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig, load_config
from ra3_megatron.launch import slurm
from ra3_megatron.launch.command import for_a_replica, launch
from ra3_megatron.launch.folder import LaunchFolder
from ra3_megatron.launch.job import Wanted, run_job
from ra3_megatron.launch.settings import Settings, job_variables


def inside_a_job(
    target: Path, overrides: list[str], stage: str | None, arm: str | None, round: int | None, join: bool
) -> int:
    """Returns the job's exit code. Raises UserError outside of a job and for impossible requests."""
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError(
            "this is the inside of a Slurm job; submit it: sbatch slurm/midtrain.sh CONFIG, or slurm/chain.sh"
        )
    if stage is None:
        config = load_config(_config_of(target), overrides)
        print(launch(target, overrides, _own_shape(config)), flush=True)
        return 0
    path = _config_of(target)
    config = load_config(path, overrides)
    if overrides:
        # The processes read the same file: what was replaced on the command line has to be in it.
        folder = LaunchFolder(Path(config.run.dir).absolute())
        path = folder.path / f"config-{slurm.own_id()}.yaml"
        config = replace(config, run=replace(config.run, dir=str(folder.run)))
        config.save(path)
    return run_job(config, path.absolute(), Wanted(stage, arm, round, join))


def _config_of(target: Path) -> Path:
    """The configuration itself, or that of a run's folder: as it was launched, else as its first stage wrote it."""
    if not target.is_dir():
        return target
    launched = LaunchFolder(target.absolute()).config
    return launched if launched.exists() else target / "config.yaml"


def _own_shape(config: RunConfig) -> Settings:
    """A chain whose jobs look like this one: as many nodes, GPUs and minutes; arrays of single replicas."""
    env, v = os.environ, job_variables()
    limit = slurm.job_facts(env["SLURM_JOB_ID"]).get("TimeLimit", "")
    gpus = env.get("SLURM_GPUS_ON_NODE", "")
    nodes = int(env.get("SLURM_JOB_NUM_NODES", "1")) - v.spares
    if nodes < 1:
        raise UserError(f"RA3_SPARES = {v.spares} of {nodes + v.spares} nodes; leave at least one to work")
    shape = Settings(
        nodes=nodes,
        gpus_per_node=int(gpus) if gpus.isdigit() else 0,
        processes_per_node=v.processes,
        spares=v.spares,
        time="" if limit in ("", "UNLIMITED", "Partition_Limit") else limit,
        grace_s=int(v.grace_s),
        restart=v.restart,
    )
    shape = for_a_replica(config, shape)
    return replace(shape, array=max(1, nodes // shape.array_nodes))
