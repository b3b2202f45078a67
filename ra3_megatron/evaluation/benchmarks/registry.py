"""Benchmarks and task sets by name: where their files are looked for, and how they are read."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.evaluation import BENCHMARKS
from ra3_megatron.evaluation.benchmarks import codeforces, evalplus, humaneval, livecodebench, mbpp, training
from ra3_megatron.evaluation.benchmarks.expected import cache_folder, expected_outputs
from ra3_megatron.evaluation.benchmarks.rows import SUFFIXES, Hub, Row, read_hub, read_rows
from ra3_megatron.evaluation.benchmarks.task import Task, TaskSet, refuse_duplicates
from ra3_megatron.reward.judge import count_tests

TASK_LAYOUTS = ("mbpp_train", "acecode", "deepcoder", "areal", "tasks")
"""Layouts of training tasks, besides those of the benchmarks."""
LAYOUTS = (*BENCHMARKS, *TASK_LAYOUTS)


@dataclass(frozen=True)
class Source:
    """Where tasks are read from, and what of reading can be set."""

    path: str | None = None
    """A file, or a folder that is searched for the usual names; none = the hub."""
    cache_dir: str | None = None
    """Where computed expected outputs are kept; none = the user's cache folder."""
    lcb_start: str | None = None
    """LiveCodeBench: first day, ISO 8601."""
    lcb_end: str | None = None
    """LiveCodeBench: last day."""
    cpu_s: float = 4.0
    """EvalPlus: least limit of a call, processor seconds; slow references raise it."""
    say: Callable[[str], None] = lambda text: None
    """Told what takes long."""


_PLACES: dict[str, tuple[tuple[str, ...], Hub | None]] = {
    "humaneval": (humaneval.FILES, humaneval.HUB),
    "humaneval+": (evalplus.HUMANEVAL_FILES, evalplus.HUMANEVAL_HUB),
    "mbpp": (mbpp.FILES, mbpp.HUB),
    "mbpp+": (evalplus.MBPP_FILES, evalplus.MBPP_HUB),
    "livecodebench": (livecodebench.FILES, livecodebench.HUB),
    "codeforces": (codeforces.FILES, codeforces.HUB),
    "mbpp_train": (mbpp.FILES, mbpp.HUB),
    "acecode": (training.ACECODE_FILES, training.ACECODE_HUB),
    "deepcoder": (training.DEEPCODER_FILES, training.DEEPCODER_HUB),
    "areal": (training.AREAL_FILES, training.AREAL_HUB),
    "tasks": (training.TASK_FILES, None),
}


def check_names(names: Sequence[str], known: Sequence[str], field: str) -> None:
    """Raise UserError for a name that is not among `known`, with the nearest one."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]!r}?" if close else "choose among them"
            raise UserError(f"{field} has {name!r}; known are {', '.join(known)}; {hint}")
    if len(set(names)) < len(names):
        raise UserError(f"{field} = {', '.join(names)}; name each once")


def find_files(name: str, path: Path) -> list[Path]:
    """Files of a layout at `path`: the file itself, or those of the usual names in the folder or one below it.

    Raises UserError when there is nothing.
    """
    if path.is_file():
        return [path]
    patterns = _PLACES[name][0]
    if not path.is_dir():
        raise UserError(f"no data for {name} at {path}: there is no such file or folder; give the path of one")
    for pattern in patterns:
        for place in (pattern, f"*/{pattern}"):
            found = sorted(p for p in path.glob(place) if p.is_file() and p.name.endswith(SUFFIXES))
            if found:
                return found
    raise UserError(
        f"no data for {name} in {path}: looked for {', '.join(patterns)}, there and one folder down; put the file "
        "there, or name it (see docs/evaluation.md)"
    )


def load_tasks(name: str, source: Source) -> TaskSet:
    """The tasks of one layout. Raises UserError for missing data, malformed rows (file, line, field), doubled ids."""
    check_names([name], LAYOUTS, "the task layout")
    hub = _PLACES[name][1]
    if source.path is not None:
        files = find_files(name, Path(source.path))
        rows, fingerprint = read_rows(files)
        where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    elif hub is None:
        raise UserError(f"no file was given for the task layout {name}; give its path")
    else:
        rows, fingerprint = read_hub(hub)
        where = f"{hub.name} on the hub"
    tasks, dropped, shots = _read(name, rows, source, fingerprint)
    refuse_duplicates(tasks, [rows[task.number].place for task in tasks])
    for task in tasks:
        if task.visible > count_tests(task.tests):
            raise UserError(
                f"{rows[task.number].place}: visible is {task.visible}, and there are fewer tests; lower it"
            )
    if not tasks:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "it holds none of that part"
        raise UserError(f"{where} has no task left for {name} ({why}); give other data or other settings")
    return TaskSet(name, tuple(tasks), where, fingerprint, tuple(shots), dropped)


def _read(
    name: str, rows: Sequence[Row], source: Source, fingerprint: str
) -> tuple[list[Task], dict[str, int], list[Task]]:
    """Tasks, drops by reason, few-shot examples."""
    if name == "humaneval":
        return humaneval.read(rows), {}, []
    if name in ("humaneval+", "mbpp+"):
        cache = cache_folder(source.cache_dir)
        tasks = evalplus.read(
            rows, name, lambda asked: expected_outputs(asked, cache, name, fingerprint, source.say), source.cpu_s
        )
        return tasks, {}, []
    if name in ("mbpp", "mbpp_train"):
        every = mbpp.read(rows)
        parts = (mbpp.TEST_IDS,) if name == "mbpp" else mbpp.TRAIN_IDS
        return mbpp.part_of(every, *parts), {}, mbpp.part_of(every, mbpp.SHOT_IDS)
    if name == "livecodebench":
        return *livecodebench.read(rows, source.lcb_start, source.lcb_end), []
    readers = {
        "codeforces": codeforces.read,
        "acecode": training.read_acecode,
        "deepcoder": training.read_deepcoder,
        "areal": training.read_areal,
        "tasks": training.read_tasks,
    }
    return *readers[name](rows), []
