"""Supervised training on packed trajectories: the baseline arm `ntp`, and the M-step of RA3."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ra3_megatron.checkpoint.state import TrainState
from ra3_megatron.checkpoint.store import CheckpointStore, SaveEvent
from ra3_megatron.checkpoint.weights import load_weights
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.estimate import flops
from ra3_megatron.config.validate import sequence_multiple, total_steps
from ra3_megatron.data.batch import TrainBatch, collate
from ra3_megatron.data.packing import PackedWindows, train_sequence
from ra3_megatron.data.prepare import PreparedCorpus
from ra3_megatron.data.sampler import RankBatch, SamplerState, WindowSampler
from ra3_megatron.data.store import TrajectoryStore
from ra3_megatron.model.factory import build_model, choose_layers
from ra3_megatron.parallel.groups import seed_everything
from ra3_megatron.parallel.phases import phase
from ra3_megatron.report.metrics import MetricsLog
from ra3_megatron.report.progress import Progress
from ra3_megatron.report.schema import METRICS_FILE, WALL, read_metrics
from ra3_megatron.stages.context import Context
from ra3_megatron.stages.run_folder import StageFolder, new_attempt
from ra3_megatron.training.components import code_cross_entropy_component, cross_entropy_component
from ra3_megatron.training.engine import StepResult, TrainEngine
from ra3_megatron.training.optimizer import apply_settings

COMPONENTS = ("cross_entropy", "code_cross_entropy")
"""Loss components: what is learned, and code tokens alone, for figures that compare between arms."""


@dataclass(frozen=True)
class SftInputs:
    """What the stage trains on and from."""

    corpus: PreparedCorpus
    """Prepared corpus with its tokenizer."""
    hf_folder: Path
    """config.json and tokenizer that every checkpoint carries."""
    weights: Path | None
    """Checkpoint folder the weights come from; none = random."""
    raw: PreparedCorpus
    """The same code without thoughts: what the length of the training counts, and what is measured beside; the corpus
    itself where it has no thoughts."""


def run_sft(context: Context, stage: StageFolder, inputs: SftInputs) -> dict[str, Any]:
    """Train to the configured length, going on from the newest checkpoint; returns the stage's result."""
    if stage.done:
        return context.on_main(f"result of {stage.path.name}", stage.result)
    context.on_main("log folder", lambda: new_attempt(stage) and None)
    trainer = Trainer(context, stage, inputs)
    result = trainer.train()

    def finish() -> dict[str, Any]:
        records = read_metrics(stage.path / METRICS_FILE)
        losses: dict[str, float] = {}
        for name in ("validation_loss", "validation_code_loss", "bare_code_loss"):
            if measured := [r[name] for r in records if name in r]:
                losses |= {f"{name}_before": measured[0], name: measured[-1]}
        seconds = sum(r[WALL].get("step_seconds", 0.0) for r in records if WALL in r)
        stage.finish({**result, **losses, "seconds": seconds})
        return stage.result()

    return context.on_main("end of training", finish)


class Trainer:
    """The loop and what it holds."""

    def __init__(self, context: Context, stage: StageFolder, inputs: SftInputs) -> None:
        self.context, self.config, self.parallel = context, context.config, context.parallel
        self.stage = stage
        corpus, c = inputs.corpus, context.config
        multiple = context.layout.sequence_multiple
        self.eos_id, self.multiple = corpus.tokenizer.eos_id, multiple
        self.windows = self._pack(corpus.train)
        self.validation = {}
        if len(corpus.validation):
            self.validation["validation"] = self._pack(corpus.validation)
        raw = self.windows
        if inputs.raw.fingerprint != corpus.fingerprint:
            raw = self._pack(inputs.raw.train)
            if len(inputs.raw.validation):
                self.validation["bare"] = self._pack(inputs.raw.validation)
        self.total = total_steps(c, context.layout, len(raw))
        if c.train.steps is None:
            # The same code in more windows: every arm sees the same code equally often.
            self.total = -(-self.total * len(self.windows) // len(raw))
        self.sampler = WindowSampler(len(self.windows), c.train.global_batch_size, c.run.seed, self.windows.fingerprint)
        self.engine = self._build_engine(inputs)
        self.store = CheckpointStore(
            stage.path / "checkpoints",
            c.checkpoint,
            self.parallel,
            architecture=context.architecture,
            hf_folder=inputs.hf_folder,
        )
        self.metrics = MetricsLog(stage.path, c.report, self.parallel.is_main)
        self.state = self._start_state(inputs)
        self.skipped_in_a_row = 0

    def _pack(self, store: TrajectoryStore) -> PackedWindows:
        c = self.config
        make = partial(train_sequence, loss_on=c.train.loss_on)
        return PackedWindows(store, c.train.seq_length, self.eos_id, self.multiple, c.run.seed, make)

    def _build_engine(self, inputs: SftInputs) -> TrainEngine:
        c = self.config
        seed_everything(c.run.seed, self.parallel)
        self.context.say(f"model: {choose_layers(c.model).reason}, {c.model.precision}, device {self.parallel.device}")
        chunks = build_model(self.context.architecture, c.model, self.parallel)
        if inputs.weights is not None:
            load_weights(inputs.weights, chunks, self.context.architecture, self.parallel)
        components = [cross_entropy_component(), code_cross_entropy_component()]
        return TrainEngine(c, self.context.architecture, self.parallel, chunks, components, self.total)

    def _start_state(self, inputs: SftInputs) -> TrainState:
        """Where to go on: the newest valid checkpoint, or the beginning."""
        latest = self.store.latest()
        if latest is None:
            self.metrics.truncate_after(-1)
            return TrainState(
                stage=self.stage.path.name,
                data=asdict(self.sampler.state),
                lr_schedule=self._schedule_facts(),
                config_sha256=self.config.fingerprint(),
            )
        self._refuse_other_padding(latest.state)
        loaded = self.store.load(
            latest,
            self.engine.chunks,
            self.engine.optimizer,
            self.engine.scheduler,
            data_fingerprint=self.windows.fingerprint,
        )
        apply_settings(self.config, self.engine.optimizer, self.engine.scheduler)
        self.sampler.load_state_dict(loaded.state.data)
        self.metrics.truncate_after(loaded.state.step)
        self.context.say(f"resumed from {latest.folder} (step {loaded.state.step} of {self.total})")
        # Settings are the configuration's, also where a change was accepted.
        return replace(loaded.state, lr_schedule=self._schedule_facts(), config_sha256=self.config.fingerprint())

    def _refuse_other_padding(self, state: TrainState) -> None:
        """Raise UserError when the checkpoint's context parallelism packed other windows than this run's would."""
        was, now = state.layout.get("context", 1), self.context.layout.context
        if sequence_multiple(was) != self.multiple:
            raise UserError(
                f"{self.stage.path} was trained with parallel.context {was}, which pads sequences to multiples of "
                f"{sequence_multiple(was)}; {now} pads them to {self.multiple} and packs other windows; "
                f"go on with parallel.context={was}, or start a new run from its weights"
            )

    def _schedule_facts(self) -> dict[str, Any]:
        return {**asdict(self.config.optimizer), "total_steps": self.total}

    # ---------------------------------------------------------------- the loop

    def train(self) -> dict[str, Any]:
        """Steps, measurements and checkpoints until the end; returns the stage's result."""
        c, t = self.config, self.config.train
        batches = self._prefetched(
            self.sampler.batches_for(self.parallel.data_rank, self.context.layout.data, t.micro_batch_size)
        )
        first = self.state.step
        with self.metrics, Progress(self.total, self.stage.path.name, self.parallel.is_main, first) as progress:
            if first == 0:
                self._measure(progress)
            mark = time.monotonic()
            for step in range(first + 1, self.total + 1):
                with phase("data"):
                    micro_batches, position = next(batches)
                result = self.engine.train_step(micro_batches, step)
                self._count(result, position)
                seconds, mark = time.monotonic() - mark, time.monotonic()
                self._log(step, result, seconds, progress)
                if step == self.total or (t.eval_interval and step % t.eval_interval == 0):
                    self._measure(progress)
                    mark = time.monotonic()
                if step == self.total or step % c.checkpoint.interval == 0:
                    self._report(self._save(step), progress)
                self._report(self.store.poll(), progress)
                if step < self.total and (reason := self.context.interrupt.requested(step)):
                    self._save_at_once(step, progress)
                    raise reason
            self._report(self.store.drain(), progress)
        return self._result()

    def _save_at_once(self, step: int, progress: Progress) -> None:
        """A checkpoint of `step` on disk before this returns, unless it is there already."""
        if step % self.config.checkpoint.interval:
            self._report(self._save(step), progress)
        self._report(self.store.drain(), progress)

    def _prefetched(self, source: Iterator[RankBatch]) -> Iterator[tuple[list[TrainBatch], SamplerState]]:
        """Micro-batches of the coming steps, the next one made while a step runs."""

        def make(batch: RankBatch) -> tuple[list[TrainBatch], SamplerState]:
            return [self._collate(self.windows, row.tolist()) for row in batch.windows], batch.state

        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
            coming = pool.submit(make, next(source))
            while True:
                ready = coming.result()
                coming = pool.submit(make, next(source))
                yield ready

    def _collate(self, windows: PackedWindows, numbers: list[int]) -> TrainBatch:
        """One micro-batch; window number -1 is padding alone."""
        pad = self.eos_id if self.eos_id is not None else 0
        chosen = [windows[n] if n >= 0 else [] for n in numbers]
        return collate(chosen, self.config.train.seq_length, pad, self.multiple, COMPONENTS)

    def _count(self, result: StepResult, position: SamplerState) -> None:
        state = self.state
        self.state = replace(
            state,
            step=state.step + 1,
            tokens=state.tokens + round(result.weights["cross_entropy"]),
            code_tokens=state.code_tokens + round(result.weights["code_cross_entropy"]),
            samples=state.samples + self.config.train.global_batch_size,
            skipped_steps=state.skipped_steps + result.skipped,
            data=asdict(position),
        )
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        if self.skipped_in_a_row > self.config.train.max_skipped_steps:
            raise RuntimeError(
                f"{self.skipped_in_a_row} steps in a row were skipped for a NaN or infinity (the last at step "
                f"{self.state.step}); lower optimizer.lr or look at the messages above"
            )

    def _log(self, step: int, result: StepResult, seconds: float, progress: Progress) -> None:
        tokens = self.context.layout.tokens_per_step
        self.metrics.log(
            step,
            loss=result.loss,
            code_loss=result.components["code_cross_entropy"],
            lr=result.lr,
            grad_norm=result.grad_norm,
            loss_tokens=round(result.weights["cross_entropy"]),
            tokens=self.state.samples * self.config.train.seq_length,
            samples=self.state.samples,
            epoch=self.state.samples / len(self.windows),
            skipped_steps=self.state.skipped_steps,
            step_seconds=seconds,
            tokens_per_second=tokens / seconds,
            **result.fp8,
        )
        if step % self.config.report.interval == 0 or step == self.total:
            progress.update(step, loss=result.loss, tokens_per_second=tokens / seconds)

    def _measure(self, progress: Progress) -> None:
        """Losses over the first windows of the validation split, logged at the current step."""
        figures = {}
        if "validation" in self.validation:
            losses = self._losses(self.validation["validation"])
            figures["validation_loss"] = losses["cross_entropy"]
            figures["validation_code_loss"] = figures["bare_code_loss"] = losses["code_cross_entropy"]
        if "bare" in self.validation:
            figures["bare_code_loss"] = self._losses(self.validation["bare"])["code_cross_entropy"]
        if figures:
            self.metrics.log(self.state.step, **figures)
            progress.update(self.state.step, validation_loss=figures["validation_loss"])

    def _losses(self, windows: PackedWindows) -> dict[str, float]:
        """Mean of every component over the first `train.eval_windows` windows."""
        t, layout = self.config.train, self.context.layout
        count = min(t.eval_windows, len(windows))
        own = t.global_batch_size // layout.data
        totals, weights = dict.fromkeys(COMPONENTS, 0.0), dict.fromkeys(COMPONENTS, 0.0)
        for start in range(0, count, t.global_batch_size):
            mine = [start + self.parallel.data_rank * own + i for i in range(own)]
            rows = [n if n < count else -1 for n in mine]
            groups = [rows[i : i + t.micro_batch_size] for i in range(0, own, t.micro_batch_size)]
            result = self.engine.evaluate([self._collate(windows, g) for g in groups])
            for name in COMPONENTS:
                totals[name] += result.components[name] * result.weights[name]
                weights[name] += result.weights[name]
        return {name: totals[name] / weights[name] for name in COMPONENTS}

    def _save(self, step: int) -> SaveEvent | None:
        engine = self.engine
        self.context.interrupt.beat("save", self.config.checkpoint.timeout_s)
        with phase("save"):
            return self.store.save(step, engine.chunks, engine.optimizer, engine.scheduler, self.state)

    def _report(self, event: SaveEvent | None, progress: Progress) -> None:
        if event is not None:
            progress.message(event.text)

    def _result(self) -> dict[str, Any]:
        last = self.store.latest()
        if last is None or last.step != self.total:
            raise RuntimeError(
                f"the last checkpoint (step {self.total}) of {self.stage.path} is not on disk; "
                "see the message of its save above, make room, and run the same command again"
            )
        return {
            "checkpoint": str(last.folder.relative_to(self.context.folder.path)),
            "step": self.total,
            "tokens": self.state.tokens,
            "samples": self.state.samples,
            "code_tokens": self.state.code_tokens,
            "flops": flops(
                self.context.architecture,
                self.state.samples * self.config.train.seq_length,
                self.config.train.seq_length / 2,
                training=True,
            ),
            "parameters_sha256": last.parameters_sha256,
        }
