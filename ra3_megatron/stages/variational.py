"""The E-step: reinforcement learning of q, the policy that thinks (paper Eq. 4.1).

Each step takes a few snippets; q thinks between their lines, several times each; a scorer says how likely the expert's
lines became, and one optimizer step makes thoughts that helped more likely. Rollouts of `draw_steps` steps are drawn at
once, with the same weights; with `draw_ahead` before the steps before them are trained. Checkpoints fall between these
draws: rollouts missing in the record after a crash are drawn again with the weights of the checkpoint; what is drawn
ahead is on record before it is written.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ra3_megatron.checkpoint.state import TrainState
from ra3_megatron.checkpoint.store import CheckpointStore, SaveEvent
from ra3_megatron.config.estimate import flops
from ra3_megatron.data.batch import TrainBatch, collate
from ra3_megatron.data.prepare import PreparedCorpus
from ra3_megatron.data.sampler import SamplerState
from ra3_megatron.parallel.collectives import all_reduce_max, all_reduce_sum, broadcast_object
from ra3_megatron.parallel.phases import phase
from ra3_megatron.parallel.split import Side
from ra3_megatron.report.metrics import MetricsLog
from ra3_megatron.report.progress import Progress
from ra3_megatron.report.schema import METRICS_FILE, WALL, read_metrics
from ra3_megatron.rollout.experience import Experience, Member, make_experience, whole_programs
from ra3_megatron.rollout.figures import BatchFigures, batch_figures, is_flat
from ra3_megatron.rollout.update import EXTRAS, update_batches, update_sequences
from ra3_megatron.stages.ahead import Block, next_block, note, noted
from ra3_megatron.stages.context import Context
from ra3_megatron.stages.policy import Basis, Policy
from ra3_megatron.stages.probe import Probe
from ra3_megatron.stages.run_folder import StageFolder, new_attempt
from ra3_megatron.stages.split import idle_of, sides
from ra3_megatron.stages.variational_draws import Drawn, Work, generate, make_drawing
from ra3_megatron.training.actions import ACTION
from ra3_megatron.training.engine import StepResult
from ra3_megatron.training.optimizer import apply_settings

WORK = ("rollout_tokens", "forward_passes", "scored_tokens", "trained_tokens", "sequence_tokens")
"""What is counted over all replicas: tokens fed by rollouts, their forward passes, tokens scored and trained on with
padding, tokens trained on without."""

ROLLOUTS = Path("data", "rollouts")
"""The record of rollouts, in the stage's folder."""


@dataclass(frozen=True)
class VariationalInputs:
    """What q is trained on and from."""

    corpus: PreparedCorpus
    """Snippets without thoughts."""
    hf_folder: Path
    """config.json and tokenizer that every checkpoint carries."""
    weights: Path | None
    """Checkpoint folder the round starts from, which is also the frozen scorer; none = random."""
    round: int
    """EM round, from 1; the random numbers depend on it."""
    whole_block: bool
    """Credit every thought with the whole snippet (arm `brite`)."""


def run_variational(context: Context, stage: StageFolder, inputs: VariationalInputs) -> dict[str, Any]:
    """Train q until the reward is flat or all steps are taken, going on from the newest checkpoint.

    Result: `checkpoint`, `step`, `stopped` (`steps` or `flat`), `reward_first`, `reward_last` (of these steps),
    `probe_reward_before`, `probe_reward_after`, `probe_rise`, `probe_rise_error` (null without a probe), `flops`,
    `rollout_tokens`, `broken_programs`, `tokens`, `samples`, `parameters_sha256`, `seconds`.
    """
    if stage.done:
        return context.on_main(f"result of {stage.path.name}", stage.result)
    context.on_main("log folder", lambda: new_attempt(stage) and None)
    result = _trained(context, stage, inputs)

    def finish() -> dict[str, Any]:
        records = read_metrics(stage.path / METRICS_FILE)
        rewards = [r["reward"] for r in records if "reward" in r]
        seconds = sum(r[WALL].get("step_seconds", 0.0) for r in records if WALL in r)
        stage.finish({**result, "reward_first": rewards[0], "reward_last": rewards[-1], "seconds": seconds})
        return stage.result()

    return context.on_main("end of the E-step", finish)


def _trained(context: Context, stage: StageFolder, inputs: VariationalInputs) -> dict[str, Any]:
    """The result of the loop, on every process: all train and draw, or some only do one of both."""
    if not context.layout.generating:
        return EStep(context, stage, inputs).train()
    result = None
    with sides(context) as (own, side):
        if side.trains:
            own.interrupt.begin(stage.path.name)
            result = EStep(own, stage, inputs, side).train()
        else:
            generate(_work(own, inputs), stage.path / ROLLOUTS, side)
    return broadcast_object(context.parallel.world, result, "result of the E-step")


def _work(context: Context, inputs: VariationalInputs) -> Work:
    return Work(Basis(context, inputs.corpus, inputs.weights, inputs.whole_block), inputs.round)


class EStep:
    """The loop and what it holds. `side`: where others draw."""

    def __init__(
        self, context: Context, stage: StageFolder, inputs: VariationalInputs, side: Side | None = None
    ) -> None:
        work = _work(context, inputs)
        basis = work.basis
        self.context, self.parallel, self.stage, self.inputs = context, context.parallel, stage, inputs
        self.policy, self.basis = Policy(basis), basis
        self.config, self.v = basis.config, basis.config.variational
        self.snippets, self.settings = work.snippets, basis.settings(inputs.round)
        self.drawing = make_drawing(work, self.policy.engine.chunks, stage.path / ROLLOUTS, side)
        self.drawing_replicas = self.parallel.sizes.data if side is None else side.generating
        self.probe = Probe(self.policy, work, self.drawing, stage.path)
        self.store = CheckpointStore(
            stage.path / "checkpoints",
            self.config.checkpoint,
            self.parallel,
            architecture=context.architecture,
            hf_folder=inputs.hf_folder,
        )
        self.metrics = MetricsLog(stage.path, self.config.report, self.parallel.is_main)
        self.state = self._start_state()
        self.history = self._history()
        self.skipped_in_a_row = 0

    # ---------------------------------------------------------------- where to go on

    def _start_state(self) -> TrainState:
        latest = self.store.latest()
        engine = self.policy.engine
        schedule = {**asdict(self.config.optimizer), "total_steps": self.v.steps}
        facts: dict[str, Any] = {"lr_schedule": schedule, "config_sha256": self.context.config.fingerprint()}
        if latest is None:
            self.metrics.truncate_after(-1)
            data = {**self.snippets.state_dict(), "work": dict.fromkeys(WORK, 0), "broken": 0, "ended": False}
            data["ahead"] = None
            return TrainState(stage=self.stage.path.name, em_round=self.inputs.round - 1, data=data, **facts)
        loaded = self.store.load(
            latest, engine.chunks, engine.optimizer, engine.scheduler, data_fingerprint=self.snippets.state.fingerprint
        )
        apply_settings(self.config, engine.optimizer, engine.scheduler)
        position = {name: loaded.state.data[name] for name in SamplerState.__dataclass_fields__}
        self.snippets.load_state_dict(position)
        self.metrics.truncate_after(loaded.state.step)
        self.context.say(f"resumed from {latest.folder} (step {loaded.state.step} of {self.v.steps})")
        return replace(loaded.state, **facts)

    def _history(self) -> list[tuple[float, float]]:
        """Reward of every step so far over that of the bare text, and its error: what the early stop looks at."""

        def read() -> list[tuple[float, float]]:
            path = self.stage.path / METRICS_FILE
            records = read_metrics(path) if path.exists() else []
            return [(r["reward_over_bare"], r["reward_over_bare_error"]) for r in records if "reward" in r]

        return self.context.on_main("rewards so far", read)

    @property
    def flat(self) -> bool:
        """Whether the reward has stopped rising; alike on all processes."""
        values, errors = [v for v, _ in self.history], [e for _, e in self.history]
        return is_flat(values, errors, self.v.flat_window, self.v.flat_tolerance)

    @property
    def finished(self) -> bool:
        """Whether the last step is taken."""
        return self.state.step >= self.v.steps or self.flat

    # ---------------------------------------------------------------- the loop

    def train(self) -> dict[str, Any]:
        """Draws, steps, checkpoints and the probe at both ends; returns the stage's result."""
        with (
            self.drawing,
            self.metrics,
            Progress(self.v.steps, self.stage.path.name, self.parallel.is_main, self.state.step) as progress,
        ):
            if self.state.step == 0:
                self._probe("before", progress)
            under_way = not self.finished and (self._order_drawn_ahead() or self._order(self.state.step + 1))
            while under_way:
                drawn = self.drawing.collect()
                under_way = self.v.draw_ahead and self._order(drawn.block.last + 1)
                self._learn(drawn, progress)
                # What older weights drew must be on record before newer ones are saved.
                self.drawing.settle()
                self._after_draw(drawn.block, progress)
                under_way = not self.finished and (under_way or self._order(self.state.step + 1))
            if not self.state.data["ended"]:
                self._probe("after", progress)
                self.state = replace(self.state, data={**self.state.data, "ended": True, "ahead": None})
                self._report(self._save(), progress)
            self._report(self.store.drain(), progress)
        return self._result()

    def _order(self, first: int) -> bool:
        """Have the rollouts of the steps from `first` on drawn with the weights as they are; whether there are any."""
        block = next_block(first, self.v.draw_steps, self.v.steps, self.state.step)
        if block is not None:
            self.drawing.order(block, self.state.step)
        ahead = note(block, self.settings) if self.v.draw_ahead else None
        self.state = replace(self.state, data={**self.state.data, "ahead": ahead})
        return block is not None

    def _order_drawn_ahead(self) -> bool:
        """After a resume: have the rollouts read back that were on their way; whether there are any."""
        block = noted(self.state.data.get("ahead"), self.settings, self.v.steps, self.context.say)
        if block is not None:
            self.drawing.order(block, self.state.step)
        return block is not None

    def _after_draw(self, block: Block, progress: Progress) -> None:
        """Checkpoints, and the wish of somebody outside that the stage saves and leaves."""
        interval, step = self.v.checkpoint_interval, self.state.step
        saved = not self.finished and step // interval > (block.first - 1) // interval
        if saved:
            self._report(self._save(), progress)
        self._report(self.store.poll(), progress)
        if not self.finished and (reason := self.context.interrupt.requested(step)):
            self._report(None if saved else self._save(), progress)
            self._report(self.store.drain(), progress)
            raise reason

    def _learn(self, drawn: Drawn, progress: Progress) -> None:
        """The steps that were drawn for."""
        self.state = replace(self.state, rollout_round=self.state.rollout_round + 1)
        for step in drawn.block.steps:
            self._step(step, drawn, progress)
            if self.finished:
                return
            cost = replace(drawn.cost, forward_passes=0, tokens=0)
            drawn = replace(drawn, cost=cost, seconds=0.0, walls=dict.fromkeys(drawn.walls, 0.0))

    def _step(self, step: int, drawn: Drawn, progress: Progress) -> None:
        """Score, update, count, log."""
        start, cost = time.monotonic(), drawn.cost
        scored_before = self.policy.scorer.counters.tokens
        with phase("score"):
            experience = self.experience(drawn.by_step[step])
            figures = batch_figures(experience, self.basis.least_gain).reduced(self._add_up)
        scored = time.monotonic()
        with phase("data"):
            batches, tokens = self.batches(experience)
        result = self.policy.engine.train_step(batches, step)
        updated = time.monotonic()
        padded = sum(b.input_ids.numel() for b in batches)
        work = (
            cost.tokens,
            cost.forward_passes,
            self.policy.scorer.counters.tokens - scored_before,
            padded,
            tokens,
        )
        self._count(result, self._add_up(torch.tensor(work, dtype=torch.float64)), figures)
        walls = {
            **drawn.walls,
            "score_seconds": scored - start,
            "update_seconds": updated - scored,
            "step_seconds": drawn.seconds + updated - start,
        }
        self._log(step, result, figures, step - 1 - drawn.block.version, walls, progress)

    def _add_up(self, values: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(self.parallel.group("dp"), values, "figures of the rollouts")

    def experience(self, members: Sequence[Member]) -> Experience:
        """Rewards and advantages of this replica's rollouts of a step; broken programs are left out."""
        kept, broken, alone = whole_programs(members, self.basis.think_tokens)
        return make_experience(self.policy.score(kept), self.basis.rewards, broken, alone)

    def batches(self, experience: Experience) -> tuple[list[TrainBatch], int]:
        """Micro-batches of an update, equally many on every replica, and their tokens without padding."""
        t, multiple = self.config.train, self.context.layout.sequence_multiple
        drawn = [s.drawn or s.rollout for s in experience.scored]
        advantages = [experience.advantages_of(i) for i in range(len(drawn))]
        sequences = update_sequences(drawn, advantages, self.basis.think_tokens)
        sequences = [s for s in sequences if s.weights[ACTION].any()]
        batches = update_batches(sequences, t, self.parallel)
        # Gradients are reduced after the last micro-batch: replicas that count differently would wait for one another.
        count = all_reduce_max(self.parallel.group("dp"), len(batches), "micro-batches of the update")
        empty = collate([[]] * t.micro_batch_size, t.seq_length, 0, multiple, (ACTION,), EXTRAS)
        return batches + [empty] * (count - len(batches)), sum(len(s.ids) for s in sequences)

    def _count(self, result: StepResult, work: torch.Tensor, figures: BatchFigures) -> None:
        state, done = self.state, self.state.step + 1
        sums = {name: state.data["work"][name] + round(w) for name, w in zip(WORK, work.tolist(), strict=True)}
        data = {
            **state.data,
            "consumed": done * self.v.snippets_per_step,
            "work": sums,
            "broken": state.data["broken"] + round(float(figures.totals.broken)),
        }
        self.state = replace(
            state,
            step=done,
            tokens=sums["sequence_tokens"],
            samples=data["consumed"],
            skipped_steps=state.skipped_steps + result.skipped,
            data=data,
        )
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        if self.skipped_in_a_row > self.config.train.max_skipped_steps:
            raise RuntimeError(
                f"{self.skipped_in_a_row} steps in a row were skipped for a NaN or infinity (the last at step {done}); "
                "lower variational.lr or look at the messages above"
            )

    def _log(
        self,
        step: int,
        result: StepResult,
        figures: BatchFigures,
        lag: int,
        walls: dict[str, float],
        progress: Progress,
    ) -> None:
        values = figures.metrics(self.v.figure_discount)
        self.history.append((values["reward_over_bare"], values["reward_over_bare_error"]))
        actions = result.weights["policy_gradient"]
        work, replicas = self.state.data["work"], self.drawing_replicas
        gap = {"rollout_gap": result.monitors["rollout_gap"]} if lag == 0 else {}
        self.metrics.log(
            step,
            **values,
            **gap,
            loss=result.loss,
            policy_loss=result.components["policy_gradient"],
            clipped=result.monitors["clipped"] / actions if actions else 0.0,
            actions=round(actions),
            lag=lag,
            lr=result.lr,
            grad_norm=result.grad_norm,
            skipped_steps=self.state.skipped_steps,
            samples=self.state.samples,
            broken_programs=self.state.data["broken"],
            rollout_tokens=work["rollout_tokens"] / replicas,
            forward_passes=work["forward_passes"] / replicas,
            **result.fp8,
            **walls,
        )
        shown = {name: values[name] for name in ("reward", "think_rate")}
        progress.update(step, **shown, seconds=walls["step_seconds"], idle=idle_of(walls))

    # ---------------------------------------------------------------- probe, checkpoints, result

    def _probe(self, when: str, progress: Progress) -> None:
        """Reward of the probe's snippets, into the state and the log."""
        outcome = self.probe.measure(when, self.state.step, self.state.data.get("probe_before"))
        if outcome is None:
            return
        work = {name: value + outcome.work.get(name, 0) for name, value in self.state.data["work"].items()}
        self.state = replace(self.state, data={**self.state.data, "work": work, f"probe_{when}": outcome.facts})
        self.metrics.log(self.state.step, **outcome.metrics)
        progress.message(f"{self.stage.path.name}  {outcome.text}")

    def _save(self) -> SaveEvent | None:
        engine = self.policy.engine
        self.context.interrupt.beat("save", self.config.checkpoint.timeout_s)
        with phase("save"):
            return self.store.save(self.state.step, engine.chunks, engine.optimizer, engine.scheduler, self.state)

    def _report(self, event: SaveEvent | None, progress: Progress) -> None:
        if event is not None:
            progress.message(event.text)

    def _result(self) -> dict[str, Any]:
        last, data = self.store.latest(), self.state.data
        if last is None or last.step != self.state.step:
            raise RuntimeError(
                f"the last checkpoint (step {self.state.step}) of {self.stage.path} is not on disk; "
                "see the message of its save above, make room, and run the same command again"
            )
        work, length = data["work"], float(self.inputs.corpus.train.lengths.mean())
        count = partial(flops, self.context.architecture, context=length / 2)
        forward = count(work["rollout_tokens"] + work["scored_tokens"], training=False)
        return {
            "checkpoint": str(last.folder.relative_to(self.context.folder.path)),
            "step": self.state.step,
            "stopped": "steps" if self.state.step >= self.v.steps else "flat",
            "parameters_sha256": last.parameters_sha256,
            "tokens": self.state.tokens,
            "samples": self.state.samples,
            "rollout_tokens": work["rollout_tokens"],
            "broken_programs": data["broken"],
            "flops": forward + count(work["trained_tokens"], training=True),
            **self.probe.result(data.get("probe_before"), data.get("probe_after")),
        }
