"""The commands `ra3 launch` and `ra3 job`; nothing heavy is imported before one of them runs."""

from pathlib import Path
from typing import Annotated

import typer

from ra3_megatron.config.errors import UserError


def launch(
    target: Annotated[Path, typer.Argument(help="YAML file of the run, or the folder of a run launched before.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.field=value]...", help="Settings that replace the file's.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of a training stage.", show_default=False)] = None,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs per node; 0 = a cluster of CPUs.")] = 8,
    processes_per_node: Annotated[int, typer.Option(min=0, help="Training processes per node; 0 = one per GPU.")] = 0,
    cpus_per_process: Annotated[int, typer.Option(min=0, help="Cores per process; 0 = the cluster's default.")] = 0,
    spares: Annotated[int, typer.Option(min=0, help="Further nodes that step in for bad ones.")] = 0,
    array: Annotated[int, typer.Option(min=1, help="Jobs that share a generation stage.")] = 1,
    array_nodes: Annotated[int, typer.Option(min=0, help="Nodes of each of them; 0 = those of one replica.")] = 0,
    limit: Annotated[str, typer.Option("--time", help="Time limit of a job, such as 08:00:00.")] = "",
    grace_s: Annotated[int, typer.Option(min=1, help="Seconds before the limit at which to save.")] = 300,
    copies: Annotated[
        int, typer.Option(min=0, help="For sites without requeue: queue each stage this many times; 0 = requeue.")
    ] = 0,
    gpu_memory: Annotated[float, typer.Option(min=0, help="GiB of a GPU; refuse what needs more.")] = 0.0,
    sbatch: Annotated[list[str] | None, typer.Option(help="A further option of sbatch, such as --exclusive.")] = None,
    measured: Annotated[Path | None, typer.Option(help="Finished run to estimate the time by.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print every command, and submit nothing.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Print where the run stands.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Remove the stop file and the counts of failures, then submit.")
    ] = False,
) -> None:
    """Submit a run to Slurm, stage by stage: what is not done and not queued. Run it again to fill gaps."""
    from ra3_megatron.launch import command
    from ra3_megatron.launch.settings import Settings

    settings = None
    if nodes is not None:
        settings = Settings(
            nodes, gpus_per_node, processes_per_node, cpus_per_process, spares, array, array_nodes, limit, grace_s,
            "copies" if copies else "requeue", copies or 1, gpu_memory, tuple(sbatch or ()),
        )  # fmt: skip
    elif not target.is_dir():
        raise UserError(f"{target} is a configuration; say on how many nodes: --nodes N")
    if status:
        print(command.show_status(target, overrides or []))
    elif resume:
        print(command.resume(target, overrides or [], settings))
    else:
        print(command.launch(target, overrides or [], settings, dry_run, measured))


def job(
    target: Annotated[Path, typer.Argument(help="YAML file of the run, or the folder of a run launched before.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.field=value]...")] = None,
    stage: Annotated[str | None, typer.Option(help="Stage; none = submit the whole chain.")] = None,
    arm: Annotated[str | None, typer.Option()] = None,
    round: Annotated[int | None, typer.Option(min=1)] = None,
    join: Annotated[bool, typer.Option("--join", help="Join the shards of a generation.")] = False,
) -> None:
    """The inside of a batch script of slurm/: one stage, watched over; or the submission of all of them."""
    from ra3_megatron.launch import inside

    raise typer.Exit(inside.inside_a_job(target, overrides or [], stage, arm, round, join))
