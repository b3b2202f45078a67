"""`ra3 launch`: from a configuration, or a run's folder, to jobs in the queue."""

import json
import os
from dataclasses import replace
from pathlib import Path

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.estimate import estimate_memory
from ra3_megatron.config.run import RunConfig, load_config
from ra3_megatron.config.validate import resolve_layout, sides
from ra3_megatron.launch.estimate import Speed, corpus_tokens, job_hours, measured_speed, planned_flops
from ra3_megatron.launch.folder import LaunchFolder
from ra3_megatron.launch.settings import Settings, load_settings
from ra3_megatron.launch.status import clear, status
from ra3_megatron.launch.submit import Submitted, inherited, submit
from ra3_megatron.stages.files import missing_files, refuse_missing, undone
from ra3_megatron.stages.graph import graph
from ra3_megatron.stages.start import start_checkpoint


def open_target(
    target: Path, overrides: list[str], settings: Settings | None
) -> tuple[RunConfig, LaunchFolder, Settings]:
    """A configuration with `settings`, or a run's folder with those it was launched with, unless given anew.

    Raises UserError for a folder that was never launched, and for overrides on one.
    """
    if target.is_dir():
        folder = LaunchFolder(target.absolute())
        if overrides:
            raise UserError(
                f"{target} is a run's folder, whose configuration is fixed; leave out {' '.join(overrides)}"
            )
        if not folder.config.exists():
            raise UserError(f"{target} holds no launch; start with the configuration: ra3 launch CONFIG --nodes N")
        config = load_config(folder.config)
        return config, folder, for_a_replica(config, settings or load_settings(folder.settings))
    config = load_config(target, overrides)
    folder = LaunchFolder(Path(config.run.dir).absolute())
    folder.refuse_other(config)
    # Jobs start elsewhere: they get the folder's whole path.
    config = replace(config, run=replace(config.run, dir=str(folder.run)))
    return config, folder, for_a_replica(config, settings or Settings())


def for_a_replica(config: RunConfig, settings: Settings) -> Settings:
    """`settings` with the nodes that a replica takes, where those of an array's elements are left open."""
    p = config.parallel
    replica = p.tensor * p.pipeline * p.context
    return settings if settings.array_nodes else replace(settings, array_nodes=-(-replica // settings.processes))


def launch(
    target: Path, overrides: list[str], settings: Settings | None, dry_run: bool = False, measured: Path | None = None
) -> str:
    """Submit what is not DONE and not queued, or with `dry_run` say how; returns what to print.

    `measured` is a run whose finished stages give the speed for the estimate; none = this run's own.
    """
    config, folder, settings = open_target(target, overrides, settings)
    architecture = _architecture(config)
    layouts = check_layouts(config, settings, architecture)
    layouts += [check_memory(config, settings, architecture)] if architecture is not None else []
    speed = _speed(folder, measured)
    missing = missing_files(config, undone(config, folder.run))
    if dry_run:
        made = submit(config, folder, settings, dry_run=True)
        layouts += [f"not here, a launch would be refused: {line}" for line in missing]
        return "\n".join([*layouts, *_told(config, architecture, folder, made, speed, commands=True)])
    refuse_missing(missing)
    os.environ.update(inherited())
    with folder.locked():
        folder.write(config)
        settings.save(folder.settings)
        made = submit(config, folder, settings, dry_run=False)
    lines = _told(config, architecture, folder, made, speed, commands=False)
    return "\n".join([*lines, f"watch it: {folder.code / 'slurm' / 'status.sh'} {folder.run}"])


def show_status(target: Path, overrides: list[str]) -> str:
    """Where the run stands."""
    return status(*open_target(target, overrides, None))


def resume(target: Path, overrides: list[str], settings: Settings | None) -> str:
    """Clear what keeps the run from going on, say why it stood still, and launch it again."""
    config, folder, old = open_target(target, overrides, settings)
    return "\n".join([*clear(config, folder, old), launch(target, overrides, settings)])


def _architecture(config: RunConfig) -> Architecture | None:
    """Shape of the model where it can be read without torch. Raises UserError when RLVR's start is not there."""
    if config.rlvr.start is not None and not config.run.arms:
        found = (start_checkpoint(config) / "architecture.json").read_text(encoding="utf-8")
        return Architecture.from_dict(json.loads(found))
    if config.model.architecture is not None:
        return config.model.architecture
    source = Path(config.model.source or "")
    return Architecture.from_folder(source) if config.model.source and source.is_dir() else None


def check_layouts(config: RunConfig, settings: Settings, architecture: Architecture | None) -> list[str]:
    """How the processes of a job divide, for jobs of all nodes and for those of an array. Raises UserError if not."""
    if architecture is None:
        return ["layout: not checked, the shape of the model is only known where its file is"]
    lines = []
    jobs = [("a job", settings.nodes, True)]
    if any(node.kind == "generate" for node in graph(config)):
        jobs.append(("an element of the array", settings.array_nodes, False))
    for what, nodes, splits in jobs:
        layout = resolve_layout(config, nodes * settings.processes, architecture, splits)
        experts = (
            f"; experts: expert-tensor {layout.expert_tensor} x expert {layout.expert} x expert-data "
            f"{layout.expert_data} of the {layout.tensor * layout.context * layout.data} processes of a stage"
        )
        lines.append(
            f"{what}: {nodes} nodes x {settings.processes} = {layout.world} processes = tensor {layout.tensor} x "
            f"pipeline {layout.pipeline} x context {layout.context} x data {layout.data}; "
            f"{layout.micro_batches} micro-batches, {layout.tokens_per_step:,} tokens a step"
            f"{experts if architecture.num_experts else ''}{f'; {sides(layout)}' if layout.generating else ''}"
        )
    return lines


def check_memory(config: RunConfig, settings: Settings, architecture: Architecture) -> str:
    """What the fullest process of a job of all nodes holds. Raises UserError when that is more than a GPU was said to.

    An estimate, of which `ra3 midtrain --dry-run` tells the terms.
    """
    world = settings.nodes * settings.processes
    need = estimate_memory(config, architecture, resolve_layout(config, world, architecture)).total / 2**30
    limit, terms = settings.gpu_memory_gib, f"ra3 midtrain CONFIG --dry-run --world-size {world} has the terms"
    if 0 < limit < need:
        raise UserError(
            f"the fullest process needs about {need:.1f} GiB and a GPU has {limit:g} (--gpu-memory); raise "
            f"parallel.tensor or parallel.pipeline, or set model.recompute=full; {terms}"
        )
    return f"memory of the fullest process: about {need:.1f} GiB ({terms})"


def _speed(folder: LaunchFolder, measured: Path | None) -> Speed | None:
    if measured is not None:
        return measured_speed(measured)
    try:
        return measured_speed(folder.run)
    except UserError:
        return None


def _told(
    config: RunConfig,
    architecture: Architecture | None,
    folder: LaunchFolder,
    made: list[Submitted],
    speed: Speed | None,
    commands: bool,
) -> list[str]:
    lines, total_hours, total_gpu, unknown = [], 0.0, 0.0, []
    for job in made:
        spec = job.spec
        size = f"{spec.array} x " if spec.array else ""
        size += f"{spec.nodes}{f' + {spec.spares}' if spec.spares else ''} nodes x {spec.processes}"
        after = f", after {', '.join(spec.after)}" if spec.after else ""
        text = f"{spec.name}: {job.state} {' '.join(job.ids)}".rstrip() + f" ({spec.script}, {size} processes{after})"
        if job.state != "done" and speed is not None and architecture is not None:
            amount = planned_flops(config, architecture, spec, corpus_tokens(folder.run), speed.problems)
            hours = job_hours(spec, amount, speed)
            if hours is None:
                unknown.append(spec.name)
            else:
                gpus = spec.nodes * max(spec.gpus, 1) * max(1, spec.array)
                total_hours, total_gpu = total_hours + hours, total_gpu + hours * gpus
                text += f", about {hours:.3g} h, {hours * gpus:.3g} GPU-hours"
        lines.append(text)
        lines += [f"  {c}" for c in job.commands] if commands else []
    if speed is None:
        lines.append("time: no stage has been measured; give --measured RUN, a run with finished stages")
    else:
        left_out = f"; left out: {', '.join(unknown)}" if unknown else ""
        text = f"time: about {total_hours:.3g} h and {total_gpu:.3g} GPU-hours, one job after the other"
        lines.append(f"{text}, at the speed of {speed.source}{left_out}")
    return lines
