"""The measure stage by itself, on the snippets and the thinking model of `generating`."""

from pathlib import Path
from typing import Any

from ra3_megatron.config.validate import resolve_layout
from ra3_megatron.data.prepare import open_prepared
from ra3_megatron.parallel.groups import initialize
from ra3_megatron.stages.context import Context
from ra3_megatron.stages.measure import ArmOutcome, MeasureInputs, run_measure
from ra3_megatron.stages.run_folder import RunFolder
from tests.e2e import generating

SNIPPETS = 7


def measure(folder: str, run: str, arms: dict[str, str], base: str | None, **changes: dict[str, Any]) -> dict[str, Any]:
    """The stage on this rank, into `run`, for checkpoints by arm; what it returns."""
    changes.setdefault("measure", {"snippets": SNIPPETS, "samples": 2})
    config = generating.make_config(Path(folder), run={"dir": run}, **changes)
    with initialize(config.parallel) as parallel:
        architecture = generating.architecture(config)
        layout = resolve_layout(config, parallel.world_size, architecture)
        context = Context(config, architecture, layout, parallel, RunFolder(Path(run)))
        outcomes = {arm: ArmOutcome(Path(w), 1e9, 5000, 2.5, arm != "ntp") for arm, w in arms.items()}
        corpus = open_prepared(Path(folder) / "corpus")
        inputs = MeasureInputs(corpus, outcomes, Path(base) if base else None)
        return run_measure(context, context.folder.stage(9, "measure"), inputs)


def layouts(folder: str, arms: dict[str, str], base: str, runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One start of the processes for several `runs`: place of the run, and its section `parallel`."""
    return [measure(folder, run, arms, base, parallel=parallel) for run, parallel in runs.items()]
