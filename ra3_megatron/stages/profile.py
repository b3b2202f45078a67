"""`ra3 profile`: where the time of a stage's steps goes, and how far each part is from the least it could take.

The stage runs as it would in a run, in a folder of its own: some steps that warm up, some that are timed and nothing
else, then some under torch's profiler. Seconds by phase are those of the timed steps; the traced ones, which are
slower, say what the phases were made of.
"""

import json
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ra3_megatron.config.control import Interrupted
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import atomic_write_text
from ra3_megatron.config.hardware import chip
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.validate import resolve_layout
from ra3_megatron.model.factory import choose_layers
from ra3_megatron.parallel.collectives import gather_objects
from ra3_megatron.parallel.groups import Parallel, initialize
from ra3_megatron.parallel.launch import launch_from_env
from ra3_megatron.parallel.phases import listening
from ra3_megatron.parallel.speed import DeviceSpeed, measure_speed
from ra3_megatron.report.environment import cpu_name, device_names
from ra3_megatron.report.profile_view import PROFILE_FILE, build_profile_page, print_profile
from ra3_megatron.stages.bandwidth import bus_gb_s
from ra3_megatron.stages.context import Context
from ra3_megatron.stages.dry_run import declared_architecture
from ra3_megatron.stages.graph import Node
from ra3_megatron.stages.interrupt import Interrupt
from ra3_megatron.stages.profile_floor import Work, floors, model_flops, utilisation
from ra3_megatron.stages.profile_inputs import Profiled, build_stage, choose_stage, profiled_config
from ra3_megatron.stages.profile_recorder import NvtxRanges, Plan, Section, Steps, totals, under_nsys
from ra3_megatron.stages.profile_trace import summarise
from ra3_megatron.stages.run_folder import RunFolder
from ra3_megatron.stages.sft import Trainer

WORK = "work"
"""Folder of the stage while it runs; removed afterwards."""

MESSAGE_BYTES = 32 << 20
"""Size of the message that the network's speed is measured with."""


@dataclass(frozen=True)
class Request:
    """What is asked for on the command line."""

    stage: str | None = None
    """Kind of stage; none = the first of the run that trains."""
    arm: str | None = None
    round: int | None = None
    plan: Plan = field(default_factory=Plan)
    save: bool = True
    """Write a checkpoint after the last step, and measure it."""
    nsys: bool = False
    """Mark phases and the traced steps for Nsight Systems instead of tracing them."""
    out: Path | None = None
    """Folder for the results; none = `<run.dir>/profile/<time>`."""


@dataclass(frozen=True)
class ProfiledContext(Context):
    """A stage's context that counts its steps."""

    steps: Steps

    @cached_property
    def interrupt(self) -> Interrupt:
        """Asked after every step whether to leave."""
        return self.steps


def run_profile(config: RunConfig, request: Request) -> Path:
    """Profile a stage and return the folder of the results. Raises UserError before anything is built."""
    launch = launch_from_env()
    architecture, _ = declared_architecture(config)
    node = choose_stage(config, request.stage, request.arm, request.round)
    if config.parallel.generation_replicas and node.kind in ("variational", "rlvr"):
        raise UserError(
            f"parallel.generation_replicas is {config.parallel.generation_replicas}; a profile of {node.kind} is of "
            "replicas that all do the same; set it to 0 for the profile"
        )
    layout = resolve_layout(config, launch.world, architecture, splits=False)
    choose_layers(config.model)
    if request.nsys and not torch.cuda.is_available():
        raise UserError("--nsys marks ranges for Nsight Systems, which needs a GPU; none was found; leave --nsys out")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("megatron.core.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    with initialize(config.parallel, launch) as parallel:
        first = Context(config, architecture, layout, parallel, RunFolder(Path(config.run.dir)))
        folder = Path(first.on_main("folder of the profile", lambda: str(_new_folder(config, request.out))))
        if request.nsys and not under_nsys():
            first.say(nsys_command(sys.argv, folder))
            return folder
        changed = profiled_config(config, folder / WORK, request.plan.total, layout)
        changed_layout = resolve_layout(changed, launch.world, architecture, splits=False)
        steps = Steps(parallel, folder / WORK, request.plan, request.save, request.nsys)
        context = ProfiledContext(changed, architecture, changed_layout, parallel, RunFolder(folder / WORK), steps)
        try:
            speed, network = measure_speed(parallel, _dtype(config)), _network(parallel)
            profiled = build_stage(context, config, node)
            _run(profiled, steps, request.nsys)
            mine = _of_this_rank(parallel, steps, folder)
            every = gather_objects(parallel.world, mine, "profile", seconds=config.parallel.setup_timeout_s)
            found = _report(config, context, node, profiled, speed, network, every)
            first.on_main("results of the profile", lambda: _write(folder, found))
        finally:
            if parallel.is_main:
                shutil.rmtree(folder / WORK, ignore_errors=True)
        return folder


def nsys_command(arguments: Sequence[str], folder: Path) -> str:
    """The line that runs the same command under Nsight Systems, capturing the traced steps alone."""
    given = " ".join(["ra3", *arguments[1:]])
    return (
        "run it under Nsight Systems (behind torchrun or srun where there are several processes):\n"
        "nsys profile --trace=cuda,nvtx,cublas,cudnn,osrt --cuda-memory-usage=true --capture-range=cudaProfilerApi "
        f"--capture-range-end=stop --output={folder}/nsys-%p {given}"
    )


def _new_folder(config: RunConfig, out: Path | None) -> Path:
    folder = out or Path(config.run.dir) / "profile" / time.strftime("%Y%m%d-%H%M%S")
    if (folder / PROFILE_FILE).exists():
        raise UserError(f"{folder} holds a profile; give another folder with --out")
    return folder


def _dtype(config: RunConfig) -> torch.dtype:
    return torch.float32 if config.model.precision == "fp32" else torch.bfloat16


def _network(parallel: Parallel) -> dict[str, float]:
    """Bus bandwidth of the groups that exchange gradients, weights and activations, bytes/s."""
    groups = [(name, parallel.group(name)) for name in ("dp_cp", "tp")]
    return {n: 1e9 * bus_gb_s(parallel, g.device_group, MESSAGE_BYTES) for n, g in groups if g.size > 1}


def _run(profiled: Profiled, steps: Steps, nsys: bool) -> None:
    """The stage until all steps are measured."""
    stage = profiled.stage
    if isinstance(stage, Trainer):
        steps.count = lambda: {"trained_tokens": float(stage.state.samples * stage.config.train.seq_length)}
    else:
        steps.count = lambda: {k: float(v) for k, v in stage.state.data["work"].items()}
    listeners = [NvtxRanges()] if nsys else []
    try:
        with listening(steps.recorder):
            if listeners:
                with listening(listeners[0]):
                    stage.train()
            else:
                stage.train()
    except Interrupted:
        steps.finish()
        return
    raise RuntimeError("the stage ended before all steps of the profile were taken")


def _of_this_rank(parallel: Parallel, steps: Steps, folder: Path) -> dict[str, Any]:
    """What this process measured, as plain data; its trace is written beside."""
    timed, traced = steps.timed, steps.traced
    assert timed is not None
    found: dict[str, Any] = {
        "rank": parallel.rank,
        "steps": timed.steps,
        "step_seconds": timed.seconds / timed.steps,
        "phases": totals(timed),
        "work": {name: value / timed.steps for name, value in timed.work.items()},
        "updates": sum(i.name == "update" for i in timed.intervals) / timed.steps,
        "memory": [_moment(i, timed) for i in sorted(timed.intervals, key=lambda i: i.end)],
        "peak_memory": max((i.peak for i in timed.intervals), default=0),
        "save": None,
        "trace": None,
    }
    if steps.saving is not None:
        stall = sum(i.end - i.start for i in steps.saving.intervals if i.name == "save")
        found["save"] = {"stall_seconds": stall, "seconds": steps.saving.seconds}
    if steps.trace is not None and traced is not None:
        summary = summarise(steps.trace.events())
        found["trace"] = {**asdict(summary), "step_seconds": traced.seconds / traced.steps, "steps": traced.steps}
        folder.mkdir(parents=True, exist_ok=True)
        steps.trace.export_chrome_trace(str(folder / f"trace-rank{parallel.rank}.json.gz"))
    return found


def _moment(interval: Any, section: Section) -> dict[str, Any]:
    return {
        "seconds": interval.end - section.start,
        "phase": interval.name,
        "held": interval.held,
        "peak": interval.peak,
    }


def _report(
    original: RunConfig,
    context: ProfiledContext,
    node: Node,
    profiled: Profiled,
    speed: DeviceSpeed,
    network: dict[str, float],
    every: list[dict[str, Any]],
) -> dict[str, Any]:
    """Everything that is written: rank 0's figures, floors, utilisation, and the spread over the ranks."""
    mine, a, config = every[0], context.architecture, context.config
    counted = mine["work"]
    work = Work(
        trained=counted.get("trained_tokens", 0.0),
        scored=counted.get("scored_tokens", 0.0),
        rolled_out=counted.get("rollout_tokens", 0.0),
        forward_passes=counted.get("forward_passes", 0.0),
        updates=mine["updates"],
        attended=profiled.attended,
    )
    devices, operations = device_names(), model_flops(a, work)
    known = chip(devices[0]) if devices else None
    update = next((p["seconds"] for p in mine["phases"] if p["name"] == "update" and not p["within"]), 0.0)
    trained = model_flops(a, replace(work, scored=0.0, rolled_out=0.0))
    spread = {"step_seconds": [r["step_seconds"] for r in every], "peak_memory": [r["peak_memory"] for r in every]}
    return {
        "stage": node.name,
        "kind": node.kind,
        "model": {"parameters": a.parameter_count, "precision": config.model.precision, "weights": profiled.weights,
                  "layers": choose_layers(config.model).reason},
        "device": devices[0] if devices else cpu_name(),
        "threads": None if devices else torch.get_num_threads(),
        "layout": asdict(context.layout),
        "speed": asdict(speed),
        "chip": asdict(known) if known else None,
        "network_bytes_per_second": network,
        "work_per_step": asdict(work),
        "flops_per_step": operations,
        "utilisation": utilisation(operations, mine["step_seconds"], context.layout, speed, known),
        "utilisation_of_update": utilisation(trained, update, context.layout, speed, known) if update else None,
        "floors": [asdict(f) for f in floors(config, a, context.layout, work, speed, network)],
        "checkpoint_interval": _checkpoint_interval(original, node.kind),
        **mine,
        "ranks": spread,
    }  # fmt: skip


def _checkpoint_interval(config: RunConfig, kind: str) -> int:
    """Steps between checkpoints in a real run."""
    own = {"variational": config.variational.checkpoint_interval, "rlvr": config.rlvr.checkpoint_interval}
    return own.get(kind, config.checkpoint.interval)


def _write(folder: Path, found: dict[str, Any]) -> None:
    atomic_write_text(folder / PROFILE_FILE, json.dumps(found, indent=1))
    page = build_profile_page(folder)
    print_profile(found)
    print(f"\npage    {page}\nfigures {folder / PROFILE_FILE}")
    for trace in sorted(folder.glob("trace-rank*.json.gz")):
        print(f"trace   {trace} (ui.perfetto.dev)")
