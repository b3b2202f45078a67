"""`ra3 evaluate` and `ra3 tasks check`: benchmarks outside a run, and a set of tasks on its own reference solutions."""

import json
import logging
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ra3_megatron.checkpoint.convert import import_hf
from ra3_megatron.checkpoint.manifest import ARCHITECTURE
from ra3_megatron.checkpoint.state import read_architecture
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.experts import expert_replicas, refuse_shared_sampling
from ra3_megatron.config.files import is_done
from ra3_megatron.config.run import RunConfig, config_from_dict, load_config
from ra3_megatron.config.validate import Layout as RunLayout
from ra3_megatron.config.validate import check_model_split, padded_vocab_size, replicas
from ra3_megatron.evaluation.benchmarks.registry import LAYOUTS, Source, check_names, load_tasks
from ra3_megatron.evaluation.benchmarks.task import submission
from ra3_megatron.evaluation.verdicts import limits_of
from ra3_megatron.model.factory import choose_layers
from ra3_megatron.parallel.groups import initialize
from ra3_megatron.parallel.launch import launch_from_env
from ra3_megatron.report.environment import redact
from ra3_megatron.report.evaluation_view import write_evaluation_page
from ra3_megatron.reward.judge import Judge
from ra3_megatron.stages.context import Context
from ra3_megatron.stages.evaluate import RESULTS_FILE, EvaluateInputs, run_evaluate
from ra3_megatron.stages.run_folder import RunFolder, StageFolder

PAGE_FILE = "evaluation.html"
_TRAINED = ("rlvr", "sft", "ntp", "base")


@dataclass(frozen=True)
class _Model:
    """A model as it was named."""

    name: str
    path: Path
    kind: str
    """`checkpoint`, `source` (Hugging Face folder or GGUF, to be imported) or `results`."""


def run_alone(
    checkpoint: Path, out: Path | None, against: Path | None, settings: dict[str, Any], overrides: Sequence[str] = ()
) -> Path:
    """Evaluate one model, and compare it with another or with another evaluation's results; returns the results' path.

    `settings` are fields of `evaluation` from the command line, `overrides` are `section.field=value`. Raises UserError
    before anything is computed for what cannot be evaluated.
    """
    model = _found(checkpoint, "the model")
    if model.kind == "results":
        raise UserError(f"{checkpoint} holds results, not a model; give it with --against, and a checkpoint here")
    other = _found(against, "--against") if against is not None else None
    folder = out if out is not None else Path("evaluations") / model.name
    named = {"run": {"dir": str(folder)}, "train": {"steps": 1}, "evaluation": settings}
    config = config_from_dict(named, list(overrides))
    if not config.evaluation.benchmarks:
        raise UserError("no benchmark was named; give --benchmarks, such as humaneval,mbpp")
    models = [m for m in (other, model) if m is not None and m.kind != "results"]
    if len({m.name for m in models}) < len(models):
        models = [replace(m, name=f"{m.name}-{'against' if m is other else 'own'}") for m in models]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("megatron.core.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    choose_layers(config.model)
    launch = launch_from_env()
    with initialize(config.parallel, launch) as parallel, ExitStack() as held:
        run = RunFolder(folder)
        first = Context(config, Architecture(), _layout(config, launch.world, None), parallel, run)
        first.on_main("folder of the evaluation", lambda: held.enter_context(run.locked()) and None)
        paths = {m.name: _checkpoint(first, m) for m in models}
        architecture = _one_architecture(paths)
        context = replace(first, architecture=architecture, layout=_layout(config, launch.world, architecture))
        results = _read_results(other.path, other.name) if other is not None and other.kind == "results" else {}
        stage = StageFolder(folder)
        context.on_main("settings of the evaluation", lambda: config.save(folder / "config.yaml"))
        run_evaluate(context, stage, EvaluateInputs(paths, results))
        page = context.on_main("report", lambda: write_evaluation_page(folder, folder / PAGE_FILE, _redacted(config)))
        context.say(f"  results  {folder / RESULTS_FILE}\n  report   {page}")
    return folder / RESULTS_FILE


def _redacted(config: RunConfig) -> dict[str, Any]:
    content = redact(yaml.safe_load(config.to_yaml()))
    return {name: content[name] for name in ("model", "evaluation", "judge", "parallel")}


# ----------------------------------------------------------------------------------------------------------- models


def _found(path: Path, what: str) -> _Model:
    """What lies at a path. Raises UserError when it is nothing that can be evaluated or compared with."""
    if (path / ARCHITECTURE).is_file():
        if not is_done(path):
            raise UserError(f"{what} {path} is an unfinished checkpoint; choose one with DONE")
        return _Model(_name(path), path, "checkpoint")
    if path.name == RESULTS_FILE or (path / RESULTS_FILE).is_file():
        return _Model(path.parent.name if path.is_file() else path.name, path, "results")
    if (path / "config.yaml").is_file():
        return _Model(path.resolve().name, _of_run(path), "checkpoint")
    if path.suffix == ".gguf" or (path / "config.json").is_file():
        if not path.exists():
            raise UserError(f"{what} {path} does not exist; give a checkpoint, a run folder, or a model's folder")
        return _Model(path.stem if path.suffix == ".gguf" else path.resolve().name, path, "source")
    found = "is neither" if path.exists() else "does not exist; give"
    raise UserError(
        f"{what} {path} {found} a checkpoint folder (with {ARCHITECTURE}), a run folder, a Hugging Face folder, a GGUF "
        "file or a folder of results"
    )


def _name(path: Path) -> str:
    """A name for a checkpoint: its stage's for `<run>/<nn>-<stage>/checkpoints/step_...`, else its own."""
    path = path.resolve()
    parent = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return parent.name if path.name in ("checkpoint",) or path.parent.name == "checkpoints" else path.name


def _of_run(path: Path) -> Path:
    """The checkpoint of the last finished training stage of a run's first arm."""
    config = load_config(path / "config.yaml")
    arm = config.run.arms[0] if config.run.arms else ""
    found: list[str] = []
    for done in sorted(path.glob("[0-9]*-*/DONE")):
        kind = done.parent.name.split("-", 1)[1]
        if any(kind == t or f"-{t}-" in f"-{kind}-" for t in _TRAINED) and (not arm or arm in kind or kind == "base"):
            found.append(StageFolder(done.parent).result()["checkpoint"])
    if not found:
        raise UserError(f"the run {path} has no finished training stage; finish it, or name a checkpoint folder")
    return path / found[-1]


def _checkpoint(context: Context, model: _Model) -> Path:
    """The model's checkpoint folder; a Hugging Face folder or GGUF file is imported into the evaluation's folder."""
    if model.kind == "checkpoint":
        return model.path
    target = context.folder.path / "imported" / model.name

    def make() -> None:
        context.say(str(import_hf(model.path, target)))

    context.on_main(f"import of {model.name}", make)
    return target


def _one_architecture(paths: dict[str, Path]) -> Architecture:
    found = {name: read_architecture(path / ARCHITECTURE) for name, path in paths.items()}
    first, *others = found
    for name in others:
        if found[name] != found[first]:
            raise UserError(
                f"{name} and {first} have different shapes, and one model is in memory at a time; evaluate {first} "
                f"alone first, and give its folder of results with --against"
            )
    return found[first]


def _layout(config: RunConfig, world: int, architecture: Architecture | None) -> RunLayout:
    """How the world divides; batches of training have no meaning here. Raises UserError for sizes that do not fit."""
    p = config.parallel
    data = replicas(p, world)
    vocab = architecture.vocab_size if architecture else 1
    if architecture is not None:
        check_model_split(p, architecture)
    if p.context > 1:
        raise UserError(f"parallel.context is {p.context}; sampling does not split sequences; set it to 1")
    refuse_shared_sampling(p, "evaluation")
    padded = padded_vocab_size(vocab, config.model.vocab_multiple, p.tensor)
    experts = (p.expert, p.expert_tensor or p.tensor, expert_replicas(p, data))
    return RunLayout(world, p.tensor, p.pipeline, p.context, data, 1, 0, padded, *experts)


def _read_results(path: Path, name: str) -> dict[str, Any]:
    """Models of an evaluation's results, under names that say where they are from."""
    file = path if path.is_file() else path / RESULTS_FILE
    try:
        models = json.loads(file.read_text(encoding="utf-8"))["models"]
        for model in models.values():
            for figures in model["benchmarks"].values():
                figures["per_task"], figures["pass_at"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} holds no results of an evaluation ({error}); give another --against") from None
    return {f"{name}: {model}" if model != name else name: figures for model, figures in models.items()}


# ------------------------------------------------------------------------------------------------------------ tasks


def check_tasks(path: Path, layout: str, overrides: Sequence[str] = ()) -> tuple[str, bool]:
    """Judge the reference solutions of a task file; the account, and whether all that have one pass.

    Raises UserError for a file that cannot be read: the row, the line, the field.
    """
    check_names([layout], LAYOUTS, "--layout")
    config = config_from_dict({"train": {"steps": 1}}, list(overrides))
    source = Source(str(path), cpu_s=config.judge.cpu_s, say=print)
    tasks = load_tasks(layout, source)
    with_reference = [task for task in tasks.tasks if task.reference]
    lines = [f"{path}: {len(tasks.tasks)} tasks of layout {layout}, {len(with_reference)} with a reference solution"]
    lines += [f"  left out: {count} {reason}" for reason, count in tasks.dropped.items()]
    failed = []
    if with_reference:
        with Judge(config.judge) as judge:
            limits = limits_of(config.judge)
            verdicts = judge.judge([submission(task, task.reference, limits) for task in with_reference])
        lost = sum(v.outcome == "lost" for v in verdicts)
        failed = [(t, v) for t, v in zip(with_reference, verdicts, strict=True) if not v.ok]
        lines.append(f"  {len(with_reference) - len(failed)} references pass their own tests, {len(failed)} do not")
        lines += [f"  {lost} of them got no verdict: the sandbox failed; try again"] if lost else []
        lines += [f"  {t.id}: {v.outcome} at test {v.passed + 1} of {v.total}: {v.message[:200]}" for t, v in failed]
    return "\n".join(lines), not failed
