"""Arms over several seeds: one run per seed, and a table with intervals over seeds and paired tests.

`<run.dir>/seed-<s>` is an ordinary run with `run.arms` and `run.seed` set; what does not depend on the seed (imported
model, prepared corpora) is made by the first and linked into the others. `<run.dir>/price-<c>` holds the E-step alone,
with another price of a thought. Everything goes on where it stopped.
"""

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import atomic_dir, atomic_write_text, is_done
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.validate import Layout, resolve_layout
from ra3_megatron.evaluation.comparison import compared, comparison_table
from ra3_megatron.parallel.launch import launch_from_env
from ra3_megatron.report.compare_report import COMPARE_FILE, COMPARE_PAGE, build_compare_report
from ra3_megatron.report.schema import METRICS_FILE, read_metrics
from ra3_megatron.stages import pipeline
from ra3_megatron.stages.dry_run import declared_architecture
from ra3_megatron.stages.graph import Node, find, graph, measured
from ra3_megatron.stages.measure import MEASURED_FILE
from ra3_megatron.stages.run_folder import RunFolder, StageFolder

SEEDLESS = ("import", "prepare", "prepare-base")
"""Kinds of stages that do not depend on `run.seed`."""

_SWEPT = ("think_rate", "reward", "thought_tokens", "duration", "gain")
"""Metrics of the E-step that a sweep of prices records."""


@dataclass(frozen=True)
class _Plan:
    """Everything that will be run, checked before anything is."""

    seeds: dict[int, RunConfig]
    """Run of each seed."""
    prices: dict[float, RunConfig]
    """Run of each price whose E-step is not one of the seeds'."""
    architecture: Architecture
    layout: Layout


def run_compare(
    config: RunConfig,
    arms: Sequence[str],
    seeds: Sequence[int],
    accept_changes: bool = False,
    prices: Sequence[float] = (),
) -> Path:
    """Run every seed with `arms`, and the E-step with each of `prices`; returns the path of `compare.html`.

    Writes `compare.json` beside it and prints the table. Finished stages are skipped. Under a launcher every process
    calls it. Raises UserError, before anything is trained, for settings under which arms would not compare.
    """
    plan = _plan(config, arms, seeds, prices)
    folder, is_main = Path(config.run.dir), launch_from_env().rank == 0
    runs = list(plan.seeds.values())
    for own in runs:
        if is_main and own is not runs[0]:
            link_stages(runs[0], own, SEEDLESS)
        pipeline.run(own, accept_changes)
    for own in plan.prices.values():
        if is_main:
            link_stages(runs[0], own, (*SEEDLESS, "base"))
        for node in _up_to_variational(own):
            pipeline.run(own, accept_changes, pipeline.Only(node.kind, node.arm or None, node.round or None))
    if not is_main:
        return folder / COMPARE_PAGE
    found = {seed: _measured(own) for seed, own in plan.seeds.items()}
    # Every round rounds the length up to whole steps.
    tolerance = plan.layout.tokens_per_step * config.run.rounds
    content = compared(found, tolerance, new_base=config.model.source is None)
    if prices:
        content["think_penalty"] = [_swept(plan.prices.get(price, runs[0]), price) for price in sorted(set(prices))]
    atomic_write_text(folder / COMPARE_FILE, json.dumps(content, indent=1, allow_nan=False))
    print(comparison_table(content), flush=True)
    page = build_compare_report(folder / COMPARE_FILE)
    print(f"\n  report           {page}", flush=True)
    return page


# -------------------------------------------------------------------------------------------------- what will be run


def _plan(config: RunConfig, arms: Sequence[str], seeds: Sequence[int], prices: Sequence[float]) -> _Plan:
    """Check everything that can be, for all runs."""
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UserError(f"seeds {list(seeds)}; give one or more, each once, none below 0")
    if config.train.steps is not None:
        raise UserError(
            f"train.steps is {config.train.steps}: with thoughts as many steps see less code, and arms are compared at "
            "equal raw tokens; set train.steps=null and train.tokens or train.epochs"
        )
    if config.run.rounds > 1 and "ntp" in arms:
        raise UserError(
            f"run.rounds is {config.run.rounds} and arm ntp has no rounds: the others would see the code that many "
            "times as often; set run.rounds to 1, or leave ntp out"
        )
    if not config.data.validation_fraction:
        raise UserError("data.validation_fraction is 0; arms are compared on held-out code; raise it")
    architecture, _ = declared_architecture(config)
    by_seed = {seed: _own(config, f"seed-{seed}", arms, seed) for seed in seeds}
    for own in by_seed.values():
        layout = resolve_layout(own, launch_from_env().world, architecture)
    if not measured(next(iter(by_seed.values()))):
        raise UserError(f"arms {list(arms)}; one that does not think compares with nothing; give two or more")
    if prices and config.variational.kl != "constant":
        raise UserError(
            f"--prices with variational.kl = {config.variational.kl}, which has no price; set variational.kl=constant"
        )
    by_price = {}
    for price in prices:
        own = _own(config, f"price-{price:g}", ["ra3"], seeds[0])
        own = replace(own, variational=replace(own.variational, price=price))
        resolve_layout(own, launch_from_env().world, architecture)
        # The first seed's own E-step is not repeated.
        if "ra3" not in arms or price != config.variational.price:
            by_price[price] = own
    return _Plan(by_seed, by_price, architecture, layout)


def _own(config: RunConfig, name: str, arms: Sequence[str], seed: int) -> RunConfig:
    own = replace(config.run, dir=str(Path(config.run.dir) / name), arms=tuple(arms), seed=seed)
    return replace(config, run=own)


def _up_to_variational(config: RunConfig) -> list[Node]:
    """The first E-step and all it needs, in order."""
    nodes = graph(config)
    wanted = {find(config, "variational", "ra3", 1).name}
    for node in reversed(nodes):
        if node.name in wanted:
            wanted |= set(node.needs)
    return [node for node in nodes if node.name in wanted]


# -------------------------------------------------------------------------------------------------- files


def _stage(config: RunConfig, name: str) -> StageFolder:
    """Folder of the stage `name` of a run."""
    number = next(i for i, node in enumerate(graph(config)) if node.name == name)
    return RunFolder(Path(config.run.dir)).stage(number, name)


def link_stages(source: RunConfig, target: RunConfig, kinds: Sequence[str]) -> None:
    """Give a run the finished stages of those kinds that another has and it has not; files are linked, not copied.

    Nothing writes into a finished stage, so that the runs stay independent. On one process.
    """
    for node in graph(target):
        if node.kind not in kinds or not is_done(_stage(source, node.name).path):
            continue
        path = _stage(target, node.name).path
        if not is_done(path):
            with atomic_dir(path) as folder:
                there = _stage(source, node.name).path
                shutil.copytree(there, folder, symlinks=True, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    """A second name for a file; a copy on file systems without."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _measured(config: RunConfig) -> dict[str, Any]:
    """What the run of a seed has measured."""
    path = _stage(config, "measure").path / MEASURED_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete {path.parent} and run again") from None


def _swept(config: RunConfig, price: float) -> dict[str, Any]:
    """Figures at the end of the first E-step: means over the steps that decide whether the reward is flat."""
    stage = _stage(config, find(config, "variational", "ra3", 1).name)
    records = read_metrics(stage.path / METRICS_FILE)
    entry: dict[str, Any] = {"price": price, "steps": stage.result()["step"]}
    steps = [r for r in records if "reward" in r][-(config.variational.flat_window or 1) :]
    for name in _SWEPT:
        values = [r[name] for r in steps if not math.isnan(r.get(name, math.nan))]
        entry[name] = sum(values) / len(values) if values else None
    return entry
