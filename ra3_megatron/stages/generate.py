"""Rationale generation: z ~ q for every snippet of the corpus, written as a corpus with thoughts and as a dataset.

Replicas take whole shards and do not talk to one another until all are done. What a shard holds depends on its
snippets, the weights and the seed alone: a killed run loses the shards in flight, and neither kills nor the number of
replicas change the result.
"""

import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ra3_megatron.checkpoint.weights import load_weights, read_done
from ra3_megatron.config.control import PARTS_FOLDER, Interrupted, part_name
from ra3_megatron.config.estimate import flops
from ra3_megatron.config.files import atomic_write_text
from ra3_megatron.config.ra3 import SPEED_ONLY
from ra3_megatron.data.bootstrapped import SHARDS, join_shards, open_joined
from ra3_megatron.data.infused import InfusedSnippet, Provenance, infused_table
from ra3_megatron.data.prepare import PreparedCorpus
from ra3_megatron.data.shards import PARTS, Shard, ShardContent, ShardFolder, plan_shards
from ra3_megatron.data.store import to_columns
from ra3_megatron.data.trajectory import Kind, Trajectory
from ra3_megatron.model.factory import build_model
from ra3_megatron.parallel.collectives import all_reduce_max, raise_everywhere
from ra3_megatron.parallel.groups import seed_everything
from ra3_megatron.report.progress import Progress
from ra3_megatron.rollout.engine import RolloutEngine
from ra3_megatron.rollout.factory import build_rollout_engine
from ra3_megatron.rollout.generation import (
    Drawn,
    DrawSettings,
    Propose,
    draw_rationales,
    propose_with_hindsight,
    round_seed,
)
from ra3_megatron.rollout.interleaved import RolloutSettings, rollout
from ra3_megatron.stages.context import Context
from ra3_megatron.stages.run_folder import StageFolder, new_attempt

SAY_EVERY_S = 10.0
"""Seconds between lines of progress, at least."""


@dataclass(frozen=True)
class Part:
    """One of several jobs that share the shards of a stage between them."""

    number: int
    """From 0."""
    count: int
    """Jobs there are."""


@dataclass(frozen=True)
class GenerateInputs:
    """What thoughts are drawn for, and from which model."""

    corpus: PreparedCorpus
    """Snippets without thoughts."""
    weights: Path
    """Checkpoint folder of q."""
    round: int
    """EM round, from 1; the random numbers depend on it."""
    samples: int = 1
    """Rollouts per snippet."""
    resample: bool = False
    """Keep one of them by its importance weight (arm `bolt`)."""
    part: Part | None = None
    """Draw only this part of the shards and join nothing; none = all of them, joined."""


def run_generate(context: Context, stage: StageFolder, inputs: GenerateInputs) -> dict[str, Any]:
    """Draw thoughts for the whole corpus, going on from the shards that are there; returns the stage's result.

    Result: `snippets`, `thoughts`, `think_rate` (of the decisions offered), `thought_tokens` (mean length),
    `kept_bare`, `rollout_tokens`, `flops`, `fingerprint`, `corpus` and `dataset` (places in the stage's folder),
    `seconds` (of all replicas together), `tokens_per_second`; with resampling also `effective_samples` and
    `multi_sample_bound` (nats per code token). `data/report.json` has all counts by part. With `inputs.part` the result
    is empty, and a stage without a part joins what the parts have made. Raises Interrupted when asked to leave: the
    shards that are finished stay.
    """
    data = stage.path / "data"
    if not stage.done:
        context.on_main("log folder", lambda: new_attempt(stage) and None)
        job = _Job(context, stage, inputs)
        _draw_together(context, job)
        if inputs.part is not None:
            context.on_main("end of this part", lambda: mark_part(stage.path, inputs.part))
            return {}
        context.on_main("join of the shards", lambda: job.finish(data))

    def end() -> dict[str, Any]:
        # Shards are doubles once DONE is there; a crash may have left them.
        shutil.rmtree(data / SHARDS, ignore_errors=True)
        return stage.result()

    return context.on_main(f"result of {stage.path.name}", end)


def _draw_together(context: Context, job: "_Job") -> None:
    """Every replica draws its shards. Raises Interrupted on all when one of them was asked to leave."""
    # The end of this block waits for the slowest replica.
    seconds, world = context.config.parallel.setup_timeout_s, context.parallel.world
    with raise_everywhere(world, "rationale generation", seconds):
        reason = job.draw()
        context.interrupt.beat("waiting for the other replicas", seconds)
    if code := all_reduce_max(world, reason.code if reason else 0, "whether a replica left"):
        raise reason or Interrupted("another replica was asked to leave", code)


def mark_part(stage_path: Path, part: Part | None) -> None:
    """Say that all shards of `part` are there."""
    assert part is not None
    atomic_write_text(stage_path / PARTS_FOLDER / part_name(part.number, part.count), "")


def open_bootstrapped(stage_path: Path | str) -> PreparedCorpus:
    """The corpus with thoughts of a finished generation stage; `SftInputs` takes it like one without.

    Raises UserError when the stage has not finished.
    """
    return open_joined(Path(stage_path) / "data")


class _Job:
    """One replica's share of the work, and the end on the main process."""

    def __init__(self, context: Context, stage: StageFolder, inputs: GenerateInputs) -> None:
        self.context, self.stage, self.inputs = context, stage, inputs
        c, corpus = context.config, inputs.corpus
        latent = c.latent
        self.settings = DrawSettings(
            RolloutSettings(latent.temperature, latent.max_latent_tokens, latent.chunk_tokens),
            round_seed(c.run.seed, inputs.round),
            inputs.samples,
            inputs.resample,
        )
        self.propose: Propose = propose_with_hindsight if latent.posterior == "hindsight" else rollout
        self.max_tokens = c.train.seq_length - (corpus.tokenizer.eos_id is not None)
        weights = read_done(inputs.weights)["parameters_sha256"]
        self.provenance = Provenance(
            context.folder.path.resolve().name, stage.path.name, inputs.round, weights, corpus.fingerprint
        )
        self.stores = {part: getattr(corpus, part) for part in PARTS}
        lengths = {part: store.lengths for part, store in self.stores.items()}
        self.plan = plan_shards(lengths, c.generate.shard_snippets)
        self.shards = ShardFolder(stage.path / "data" / SHARDS, self._key(weights))

    def _key(self, weights: str) -> str:
        """Names everything the content of the shards depends on, beyond rounding."""
        latent = {k: v for k, v in vars(self.context.config.latent).items() if k not in SPEED_ONLY}
        s = self.settings
        body = [1, self.inputs.corpus.fingerprint, weights, s.seed, s.samples, s.resample, self.max_tokens, latent]
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    # ---------------------------------------------------------------- drawing

    def draw(self) -> Interrupted | None:
        """Make this replica's missing shards; returns why it left before the last of them, if it was asked to."""
        parallel, part = self.context.parallel, self.inputs.part
        finished = set(self.context.on_main("finished shards", self._finished))
        mine = [s for s in self.plan if self._owner(s) == parallel.data_rank]
        missing = [s for s in mine if s.number not in finished]
        done = sum(s.end - s.start for s in self.plan if s.number in finished)
        if part is None and finished and len(finished) < len(self.plan):
            self.context.say(f"{len(finished)} of {len(self.plan)} shards are there already")
        if not missing:
            return None
        engine = self._engine()
        writes = parallel.group("mp").rank == 0
        with _Told(self, done) as told:
            for made, shard in enumerate(missing, start=1):
                parallel.mark(f"shard {shard.number}")
                content = self._make(engine, shard)
                if writes:
                    self.shards.write(shard, content)
                told.shard(shard, content.counts)
                # Replicas do not wait for one another here: each decides for itself.
                reason = self.context.interrupt.requested(made, parallel.group("mp"))
                if reason and made < len(missing):
                    return reason
        return None

    def _owner(self, shard: Shard) -> int:
        """Replica of this job that makes `shard`; -1 = another job does."""
        replicas, part = self.context.parallel.sizes.data, self.inputs.part
        job, replica = divmod(shard.number % (replicas * (part.count if part else 1)), replicas)
        return replica if job == (part.number if part else 0) else -1

    def _finished(self) -> list[int]:
        """Shards that are there, of those this job makes; on one process."""
        own = [s for s in self.plan if self._owner(s) >= 0]
        return self.shards.finished(own, alone=self.inputs.part is None)

    def _engine(self) -> RolloutEngine:
        c, parallel, architecture = self.context.config, self.context.parallel, self.context.architecture
        seed_everything(c.run.seed, parallel)
        chunks = build_model(architecture, c.model, parallel)
        load_weights(self.inputs.weights, chunks, architecture, parallel)
        return build_rollout_engine(c, chunks, architecture, parallel, self.max_tokens)

    def _make(self, engine: RolloutEngine, shard: Shard) -> ShardContent:
        start, before = time.monotonic(), (engine.counters.tokens, engine.counters.forward_passes)
        store, corpus = self.stores[shard.part], self.inputs.corpus
        numbers = range(shard.start, shard.end)
        experts = [store[i] for i in numbers]
        # One series of ids over both parts, so that no two snippets share random numbers.
        first = len(self.stores["train"]) if shard.part == "validation" else 0
        ids = [first + i for i in numbers]
        drawn = draw_rationales(engine, experts, ids, self.settings, corpus.think_tokens, self.propose)
        infused = [_infused(i, e, d) for i, e, d in zip(numbers, experts, drawn, strict=True)]
        counts = _counts(experts, drawn)
        counts["rollout_tokens"] = engine.counters.tokens - before[0]
        counts["forward_passes"] = engine.counters.forward_passes - before[1]
        counts["seconds"] = time.monotonic() - start
        columns = to_columns([s.trajectory for s in infused], corpus.think_tokens)
        return ShardContent(columns, infused_table(infused, corpus.think_tokens, self.provenance), counts)

    # ---------------------------------------------------------------- the end

    def finish(self, data: Path) -> None:
        """Join the shards, write the counts and the result; on one process, when all shards are there."""
        joined = join_shards(self.plan, self.shards, self.inputs.corpus, data)
        seconds = sum(counts.pop("seconds") for counts in joined.values())
        report = {part: _figures(counts) for part, counts in joined.items()}
        atomic_write_text(data / "report.json", json.dumps(report, indent=1))
        total: Counter[str] = Counter()
        for counts in joined.values():
            total.update(counts)
        figures = _figures(total)
        names = ["snippets", "thoughts", "think_rate", "thought_tokens", "kept_bare", "rollout_tokens"]
        names += [name for name in ("effective_samples", "multi_sample_bound") if name in figures]
        context = total["tokens"] / total["snippets"] / 2
        self.stage.finish(
            {
                **{name: figures[name] for name in names},
                "flops": flops(self.context.architecture, total["rollout_tokens"], context, training=False),
                "fingerprint": open_joined(data).fingerprint,
                "corpus": "data/corpus",
                "dataset": "data/dataset",
                "seconds": seconds,
                "tokens_per_second": total["tokens"] / seconds,
            }
        )


class _Told:
    """Says now and then how far all replicas are, as the folder shows it, and how fast."""

    def __init__(self, job: _Job, done: int) -> None:
        self._job, self._replicas = job, job.context.parallel.sizes.data
        self._all = sum(s.end - s.start for s in job.plan)
        self._progress = Progress(self._all, job.stage.path.name, job.context.parallel.is_main, done, unit="snippet")
        self._said = self._begun = time.monotonic()
        self._snippets = self._tokens = 0.0

    def shard(self, shard: Shard, counts: dict[str, float]) -> None:
        """After each shard of this replica; its speed stands for that of the others."""
        self._snippets += counts["snippets"]
        self._tokens += counts["tokens"]
        now = time.monotonic()
        if not self._job.context.parallel.is_main:
            return
        finished = self._job.shards.count()
        if now - self._said < SAY_EVERY_S and finished < len(self._job.plan):
            return
        self._said = now
        rate = self._replicas / (now - self._begun)
        self._progress.update(
            round(self._all * finished / len(self._job.plan)),
            tokens_per_second=self._tokens * rate,
            snippets_per_second=self._snippets * rate,
        )

    def __enter__(self) -> "_Told":
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()


def _infused(number: int, expert: Trajectory, drawn: Drawn) -> InfusedSnippet:
    """The snippet as it is trained on: with the thoughts that were kept, or bare."""
    kept = drawn.kept
    if kept is None:
        unknown = np.full(len(expert.decisions), np.nan)
        return InfusedSnippet(number, expert, unknown, np.full(expert.num_lines, np.nan))
    return InfusedSnippet(number, kept.trajectory, kept.p_think, kept.line_log_probs)


def _counts(experts: Sequence[Trajectory], drawn: Sequence[Drawn]) -> dict[str, float]:
    """What of some snippets is summed over the corpus; decisions and thoughts are those of the rollouts kept."""
    kept = [d.kept for d in drawn if d.kept is not None]
    thoughts = [ids for r in kept for ids in r.trajectory.thoughts().values()]
    code = [int((e.kinds() == Kind.CODE).sum()) for e in experts]
    bounded = [(d.bound, tokens) for d, tokens in zip(drawn, code, strict=True) if math.isfinite(d.bound)]
    thought_tokens = sum(map(len, thoughts))
    return {
        "snippets": len(drawn),
        "code_tokens": sum(code),
        "tokens": sum(len(e.ids) for e in experts) + thought_tokens,
        "decisions": sum(len(r.thought) for r in kept),
        "thoughts": len(thoughts),
        "all_thought_tokens": thought_tokens,
        "truncated": sum(len(r.truncated) for r in kept),
        "not_offered": sum(r.not_offered for r in kept),
        "broken_programs": sum(d.broken for d in drawn),
        "redrawn": sum(d.tries > 1 for d in drawn),
        "kept_bare": sum(d.kept is None for d in drawn),
        "resampled": len(bounded),
        "all_effective_samples": math.fsum(d.effective_samples for d in drawn if math.isfinite(d.bound)),
        "all_bounds": math.fsum(bound for bound, _ in bounded),
        "bounded_tokens": sum(tokens for _, tokens in bounded),
    }


def _figures(counts: Mapping[str, float]) -> dict[str, float]:
    """Counts and means of a part, or of all; a mean of nothing is 0."""

    def mean(total: str, number: str) -> float:
        return counts[total] / counts[number] if counts[number] else 0.0

    figures = {name: value for name, value in counts.items() if not name.startswith("all_")}
    figures |= {
        "think_rate": mean("thoughts", "decisions"),
        "thought_tokens": mean("all_thought_tokens", "thoughts"),
        "effective_samples": mean("all_effective_samples", "resampled"),
        "multi_sample_bound": mean("all_bounds", "bounded_tokens"),
    }
    if not counts["resampled"]:
        for name in ("resampled", "bounded_tokens", "effective_samples", "multi_sample_bound"):
            del figures[name]
    return figures
