"""The E-step by itself, on a few real files with a model of random weights that thinks now and then."""

from pathlib import Path
from typing import Any

from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.validate import resolve_layout
from ra3_megatron.data.prepare import open_prepared
from ra3_megatron.parallel.groups import Parallel, initialize
from ra3_megatron.stages.context import Context
from ra3_megatron.stages.run_folder import RunFolder
from ra3_megatron.stages.variational import EStep, VariationalInputs, run_variational
from tests.e2e import generating

STAGE = "03-ra3-variational-1"


def make_config(start: Path, run: str, **changes: dict[str, Any]) -> RunConfig:
    """Four steps of four snippets, unless `changes` say otherwise."""
    sections: dict[str, Any] = {
        "run": {"dir": run, "arms": ["ra3"]},
        "base": {"tokens": 1},
        "variational": {
            "steps": 4, "snippets_per_step": 4, "group_size": 3, "checkpoint_interval": 1, "probe_snippets": 3,
            "flat_window": 0, "lr": 3e-3,
        },
    }  # fmt: skip
    for name, values in changes.items():
        sections.setdefault(name, {}).update(values)
    return generating.make_config(start, **sections)


def make_context(config: RunConfig, parallel: Parallel) -> Context:
    architecture = generating.architecture(config)
    layout = resolve_layout(config, parallel.world_size, architecture)
    return Context(config, architecture, layout, parallel, RunFolder(Path(config.run.dir)))


def make_inputs(start: Path, whole_block: bool = False) -> VariationalInputs:
    return VariationalInputs(open_prepared(start / "corpus"), start / "hf", generating.weights(start), 1, whole_block)


def write_start(folder: Path, parallel: Parallel) -> None:
    """Corpus and weights of `generating.write_start`, and the folder that checkpoints carry."""
    generating.write_start(folder, parallel)
    corpus = open_prepared(folder / "corpus")
    corpus.tokenizer.save(folder / "hf")
    (folder / "hf" / "config.json").write_text("{}")


def e_step(start: str, run: str, whole_block: bool = False, **changes: dict[str, Any]) -> dict[str, Any]:
    """The stage on this rank, into `run`; what it returns."""
    config = make_config(Path(start), run, **changes)
    with initialize(config.parallel) as parallel:
        context = make_context(config, parallel)
        return run_variational(
            context, context.folder.stage(3, "ra3-variational-1"), make_inputs(Path(start), whole_block)
        )


def open_e_step(
    start: Path, run: str, parallel: Parallel, whole_block: bool = False, **changes: dict[str, Any]
) -> EStep:
    """The stage before its first step, to look into."""
    context = make_context(make_config(start, run, **changes), parallel)
    return EStep(context, context.folder.stage(3, "ra3-variational-1"), make_inputs(start, whole_block))
