"""The E-step: reinforcement learning of q, the policy that thinks (paper Eq. 4.1).

Each step takes a few snippets; q thinks between their lines, several times each; a scorer says how likely the expert's
lines became, and one optimizer step makes thoughts that helped more likely. Rollouts of `max_lag` + 1 steps are drawn
at once, with the same weights. Checkpoints fall between these draws: whatever a crash left of the rollouts' record,
those that are missing can be drawn again with the weights of the checkpoint.
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
from ra3_megatron.parallel.collectives import all_reduce_max, all_reduce_sum
from ra3_megatron.parallel.phases import phase
from ra3_megatron.report.metrics import MetricsLog
from ra3_megatron.report.progress import Progress
from ra3_megatron.report.schema import METRICS_FILE, WALL, read_metrics
from ra3_megatron.rollout.experience import Experience, Member, make_experience, whole_programs
from ra3_megatron.rollout.figures import BatchFigures, batch_figures, is_flat
from ra3_megatron.rollout.ledger import Draw
from ra3_megatron.rollout.source import Snippet, snippets_of
from ra3_megatron.rollout.update import EXTRAS, update_batches, update_sequences
from ra3_megatron.stages.context import Context
from ra3_megatron.stages.policy import Policy
from ra3_megatron.stages.probe import Probe
from ra3_megatron.stages.run_folder import StageFolder, new_attempt
from ra3_megatron.training.actions import ACTION
from ra3_megatron.training.engine import StepResult
from ra3_megatron.training.optimizer import apply_settings

WORK = ("rollout_tokens", "forward_passes", "scored_tokens", "trained_tokens", "sequence_tokens")
"""What is counted over all replicas: tokens fed by rollouts, their forward passes, tokens scored and trained on with
padding, tokens trained on without."""


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
    result = EStep(context, stage, inputs).train()

    def finish() -> dict[str, Any]:
        records = read_metrics(stage.path / METRICS_FILE)
        rewards = [r["reward"] for r in records if "reward" in r]
        seconds = sum(r[WALL].get("step_seconds", 0.0) for r in records if WALL in r)
        stage.finish({**result, "reward_first": rewards[0], "reward_last": rewards[-1], "seconds": seconds})
        return stage.result()

    return context.on_main("end of the E-step", finish)


class EStep:
    """The loop and what it holds."""

    def __init__(self, context: Context, stage: StageFolder, inputs: VariationalInputs) -> None:
        self.context, self.parallel, self.stage, self.inputs = context, context.parallel, stage, inputs
        self.policy = Policy(context, inputs.corpus, inputs.weights, inputs.whole_block)
        self.config, self.v = self.policy.config, context.config.variational
        self.snippets = self.policy.sampler(inputs.round)
        self.probe = Probe(self.policy, stage.path)
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
        self.source = self.policy.source(stage.path / "data" / "rollouts", inputs.round, inputs.weights)
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
            self.metrics,
            self.source,
            Progress(self.v.steps, self.stage.path.name, self.parallel.is_main, self.state.step) as progress,
        ):
            if self.state.step == 0:
                self._probe("before", progress)
            while not self.finished:
                before = self.state.step
                self._draw_and_learn(progress)
                interval = self.v.checkpoint_interval
                saved = not self.finished and self.state.step // interval > before // interval
                if saved:
                    self._report(self._save(), progress)
                self._report(self.store.poll(), progress)
                if not self.finished and (reason := self.context.interrupt.requested(self.state.step)):
                    self._report(None if saved else self._save(), progress)
                    self._report(self.store.drain(), progress)
                    raise reason
            if not self.state.data["ended"]:
                self._probe("after", progress)
                self.state = replace(self.state, data={**self.state.data, "ended": True})
                self._report(self._save(), progress)
            self._report(self.store.drain(), progress)
        return self._result()

    def _draw_and_learn(self, progress: Progress) -> None:
        """Rollouts for the coming steps with the weights as they are, then these steps."""
        version, start = self.state.step, time.monotonic()
        steps = range(version + 1, min(version + 1 + self.v.max_lag, self.v.steps) + 1)
        own = self.policy.own_slots
        snippets = list(snippets_of(steps, own, self._numbers))
        self.parallel.mark(f"rollouts of step {version + 1}")
        with phase("rollout"):
            by_step, cost = self._draw(version, snippets)
        seconds = time.monotonic() - start
        self.state = replace(self.state, rollout_round=self.state.rollout_round + 1)
        for step in steps:
            self._step(step, by_step[step], cost, seconds, progress)
            if self.finished:
                return
            cost, seconds = replace(cost, forward_passes=0, tokens=0), 0.0

    def _numbers(self, step: int) -> Any:
        """Snippets of a step over all replicas, int64 [snippets_per_step]."""
        count = self.v.snippets_per_step
        return self.snippets.windows((step - 1) * count, count)

    def _draw(self, version: int, snippets: Sequence[Snippet]) -> tuple[dict[int, list[Member]], Draw]:
        experts = [self.inputs.corpus.train[s.number] for s in snippets]
        places = [s.step * self.v.snippets_per_step + s.slot for s in snippets]
        uniforms = partial(self.policy.uniforms, f"round {self.inputs.round}", places)
        return self.source.draw(self.inputs.round, version, snippets, experts, uniforms)

    def _step(self, step: int, members: Sequence[Member], cost: Draw, drawing: float, progress: Progress) -> None:
        """Score, update, count, log."""
        start = time.monotonic()
        scored_before = self.policy.scorer.counters.tokens
        with phase("score"):
            experience = self.experience(members)
            figures = batch_figures(experience, self.policy.least_gain).reduced(self._add_up)
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
            "rollout_seconds": drawing,
            "score_seconds": scored - start,
            "update_seconds": updated - scored,
            "step_seconds": drawing + updated - start,
        }
        self._log(step, result, figures, step - 1 - cost.weights_version, walls, progress)

    def _add_up(self, values: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(self.parallel.group("dp"), values, "figures of the rollouts")

    def experience(self, members: Sequence[Member]) -> Experience:
        """Rewards and advantages of this replica's rollouts of a step; broken programs are left out."""
        kept, broken, alone = whole_programs(members, self.policy.think_tokens)
        return make_experience(self.policy.score(kept), self.policy.rewards, broken, alone)

    def batches(self, experience: Experience) -> tuple[list[TrainBatch], int]:
        """Micro-batches of an update, equally many on every replica, and their tokens without padding."""
        t, multiple = self.config.train, self.context.layout.sequence_multiple
        drawn = [s.drawn or s.rollout for s in experience.scored]
        advantages = [experience.advantages_of(i) for i in range(len(drawn))]
        sequences = update_sequences(drawn, advantages, self.policy.think_tokens)
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
        work, replicas = self.state.data["work"], self.parallel.sizes.data
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
        progress.update(step, reward=values["reward"], think_rate=values["think_rate"], seconds=walls["step_seconds"])

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
