"""The command `ra3 profile`: its options. Nothing heavy is imported before it runs."""

from pathlib import Path
from typing import Annotated

import typer


def profile(
    config: Annotated[Path, typer.Argument(help="YAML file of the run, such as configs/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.field=value]...", help="Settings that replace the file's.")
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="ntp, variational, sft or rlvr; the run's first that trains unless given.")
    ] = None,
    arm: Annotated[str | None, typer.Option(help="Arm of that stage; the first of run.arms unless given.")] = None,
    round: Annotated[int | None, typer.Option(min=1, help="EM round of that stage; 1 unless given.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 3,
    warm_up: Annotated[int, typer.Option(min=1, help="Steps before them.")] = 1,
    traced: Annotated[int, typer.Option(min=0, help="Steps after them under torch's profiler; they are slower.")] = 1,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Write a checkpoint at the end, and time it.")] = True,
    nsys: Annotated[
        bool, typer.Option("--nsys", help="Print the command for Nsight Systems; under it, mark what it captures.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; <run.dir>/profile/<time> unless given.")
    ] = None,
) -> None:
    """Say where the time of a stage's steps goes, and how far each part is from the least it could take."""
    from ra3_megatron.config.run import load_config

    run_config = load_config(config, overrides or [])
    from ra3_megatron.stages.profile import Plan, Request, run_profile

    run_profile(run_config, Request(stage, arm, round, Plan(warm_up, steps, traced), save, nsys, out))
