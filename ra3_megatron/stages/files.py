"""The files that a configuration names, looked for before anything starts: a chain of days must not fail at its end.

Needs no torch: a cluster's login node asks as well.
"""

from collections.abc import Callable, Iterable
from glob import glob
from pathlib import Path

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import is_done
from ra3_megatron.config.run import RunConfig
from ra3_megatron.evaluation.benchmarks.registry import find_files
from ra3_megatron.stages.graph import Node, graph


def undone(config: RunConfig, run: Path, chosen: Iterable[Node] | None = None) -> list[Node]:
    """The stages of `chosen`, or of the whole run, that are not DONE in the folder `run`."""
    numbered = enumerate(graph(config))
    names = {node.name for number, node in numbered if not is_done(run / f"{number:02d}-{node.name}")}
    return [node for node in (graph(config) if chosen is None else chosen) if node.name in names]


def missing_files(config: RunConfig, nodes: Iterable[Node]) -> list[str]:
    """One line for each input of the stages `nodes` that is named by path and not there; empty when all are.

    Data sets on the hub are not looked for: a login node may have no way there.
    """
    checks: dict[str, Callable[[RunConfig], Iterable[str]]] = {
        "import": _model,
        "prepare": _corpus,
        "tasks": _tasks,
        "evaluate": _benchmarks,
    }
    kinds = dict.fromkeys(node.kind for node in nodes)
    return [line for kind in kinds if kind in checks for line in checks[kind](config)]


def _model(config: RunConfig) -> Iterable[str]:
    if config.model.source is not None and not Path(config.model.source).exists():
        yield (
            f"no base model at model.source {config.model.source}; download it there (a Hugging Face folder or a GGUF "
            "file), or leave model.source out to start from random weights"
        )


def _corpus(config: RunConfig) -> Iterable[str]:
    corpus = config.data.corpus
    if corpus.kind == "folder" and corpus.path is not None and not Path(corpus.path).is_dir():
        yield f"data.corpus.path = {corpus.path}; there is no such folder; give the folder with source files"
    if corpus.kind == "datasets" and corpus.files:
        patterns = [str(Path(corpus.path or "") / pattern) for pattern in corpus.files]
        if not any(glob(pattern, recursive=True) for pattern in patterns):
            yield f"no file matches data.corpus.files {', '.join(patterns)}; put the corpus there, or name it"
    for path in config.data.decontamination.benchmarks:
        if not Path(path).is_file():
            yield f"data.decontamination.benchmarks: {path} does not exist; give the path of a benchmark file"


def _tasks(config: RunConfig) -> Iterable[str]:
    if config.rlvr.tasks is not None:
        yield from _found("rlvr.tasks", config.rlvr.layout, config.rlvr.tasks)


def _benchmarks(config: RunConfig) -> Iterable[str]:
    e = config.evaluation
    for name in e.benchmarks:
        path = e.data.get(name, e.data_dir)
        if path is not None:
            yield from _found("evaluation.data" if name in e.data else "evaluation.data_dir", name, path)


def _found(field: str, layout: str, path: str) -> Iterable[str]:
    try:
        find_files(layout, Path(path))
    except UserError as error:
        yield f"{field}: {error}"


def refuse_missing(lines: list[str]) -> None:
    """Raise UserError with the first of `lines`, and how many more there are."""
    if lines:
        more = f" (and {len(lines) - 1} more: {'; '.join(lines[1:])})" if len(lines) > 1 else ""
        raise UserError(f"{lines[0]}{more}")
