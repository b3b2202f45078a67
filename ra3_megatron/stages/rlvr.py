"""RLVR: reinforcement learning with programs judged by tests; GRPO as in DeepCoder, its relatives by configuration.

Each step asks the policy some tasks, several times each; the judge runs the answers' tests while the engine still
draws; groups whose answers all earned the same are replaced by the next tasks; then the policy is updated. Answers of
`draw_steps` steps are drawn at once, with the same weights; with `draw_ahead` before the steps before them are trained.
Checkpoints fall between these draws, and answers and verdicts are recorded as they come: whatever a crash left, the
same command ends with the same bits.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ra3_megatron.checkpoint.state import TrainState
from ra3_megatron.checkpoint.store import CheckpointStore, SaveEvent
from ra3_megatron.config.estimate import flops
from ra3_megatron.data.sampler import SamplerState
from ra3_megatron.data.tokenizers import load_folder
from ra3_megatron.parallel.collectives import all_reduce_sum, broadcast_object
from ra3_megatron.parallel.phases import phase
from ra3_megatron.parallel.split import Side
from ra3_megatron.report.metrics import MetricsLog
from ra3_megatron.report.progress import Progress
from ra3_megatron.report.schema import METRICS_FILE, WALL, read_metrics
from ra3_megatron.rollout.answer_figures import AnswerFigures
from ra3_megatron.rollout.groups import REFERENCE, AnswerGroup, answer_sequences, flat
from ra3_megatron.stages.ahead import next_block, note, noted
from ra3_megatron.stages.context import Context
from ra3_megatron.stages.rlvr_draws import Ask, Drawn, generate, make_drawing
from ra3_megatron.stages.rlvr_policy import RlvrBasis, RlvrPolicy, Updated
from ra3_megatron.stages.rlvr_tasks import RlvrTasks
from ra3_megatron.stages.rlvr_validation import SAMPLES, sample_record, write_samples
from ra3_megatron.stages.run_folder import StageFolder, new_attempt
from ra3_megatron.stages.split import idle_of, sides
from ra3_megatron.training.actions import ACTION
from ra3_megatron.training.optimizer import apply_settings

WORK = ("rollout_tokens", "forward_passes", "scored_tokens", "trained_tokens", "sequence_tokens")
"""What is counted over all replicas: tokens fed by the engine, its forward passes, tokens run forward for log-probs of
other policies and tokens trained on, both with padding, and tokens trained on without."""

SHOWN_GROUPS = 4
"""Groups of a step that are written for people."""
SHOWN_MOMENTS = 8
"""Steps of a stage of which groups are written, about, beside the first and the last."""


@dataclass(frozen=True)
class RlvrInputs:
    """What is trained, and on what."""

    tasks: RlvrTasks
    hf_folder: Path
    """config.json and tokenizer that every checkpoint carries."""
    weights: Path | None
    """Checkpoint folder to start from; none = random weights."""


def run_rlvr(context: Context, stage: StageFolder, inputs: RlvrInputs) -> dict[str, Any]:
    """Train to the last step, going on from the newest checkpoint; returns the stage's result.

    Result: `checkpoint`, `step`, `pass_rate_before`, `pass_rate_after` (of held-out tasks; null without any),
    `pass_rate_first`, `pass_rate_last` (of the first and last step's answers), `tokens`, `samples` (answers),
    `rollout_tokens`, `lost_answers`, `groups_flat`, `refilled`, `flops`, `parameters_sha256`, `seconds`.
    """
    if stage.done:
        return context.on_main(f"result of {stage.path.name}", stage.result)
    context.on_main("log folder", lambda: new_attempt(stage) and None)
    context.interrupt.begin(stage.path.name)
    result = _trained(context, stage, inputs)

    def finish() -> dict[str, Any]:
        records = read_metrics(stage.path / METRICS_FILE)
        rates = [r["pass_rate"] for r in records if "pass_rate" in r]
        held_out = [r["validation_pass_rate"] for r in records if "validation_pass_rate" in r] or [None]
        seconds = sum(r[WALL].get("step_seconds", 0.0) for r in records if WALL in r)
        rates_by_name = {
            "pass_rate_before": held_out[0], "pass_rate_after": held_out[-1],
            "pass_rate_first": rates[0], "pass_rate_last": rates[-1],
        }  # fmt: skip
        stage.finish({**result, **rates_by_name, "seconds": seconds})
        return stage.result()

    return context.on_main("end of RLVR", finish)


def _trained(context: Context, stage: StageFolder, inputs: RlvrInputs) -> dict[str, Any]:
    """The result of the loop, on every process: all train and draw, or some only do one of both."""
    if not context.layout.generating:
        return Rlvr(context, stage, inputs).train()
    result = None
    with sides(context) as (own, side):
        if side.trains:
            own.interrupt.begin(stage.path.name)
            result = Rlvr(own, stage, inputs, side).train()
        else:
            generate(_basis(own, inputs), stage, side)
    return broadcast_object(context.parallel.world, result, "result of RLVR")


def _basis(context: Context, inputs: RlvrInputs) -> RlvrBasis:
    return RlvrBasis(context, inputs.tasks, load_folder(inputs.hf_folder), inputs.weights)


class Rlvr:
    """The loop and what it holds. `side`: where others draw."""

    def __init__(self, context: Context, stage: StageFolder, inputs: RlvrInputs, side: Side | None = None) -> None:
        self.context, self.parallel, self.stage, self.inputs = context, context.parallel, stage, inputs
        self.basis = basis = _basis(context, inputs)
        self.config, self.r = basis.config, basis.config.rlvr
        self.policy = RlvrPolicy(basis)
        self.order, self.settings = basis.sampler(), basis.settings
        self.drawing = make_drawing(basis, self.policy.engine.chunks, stage, side)
        self.drawing_replicas = self.parallel.sizes.data if side is None else side.generating
        self.store = CheckpointStore(
            stage.path / "checkpoints",
            self.config.checkpoint,
            self.parallel,
            architecture=context.architecture,
            hf_folder=inputs.hf_folder,
        )
        self.metrics = MetricsLog(stage.path, self.config.report, self.parallel.is_main)
        self.state = self._start_state()
        self.skipped_in_a_row = 0

    def _start_state(self) -> TrainState:
        """Where to go on: the newest valid checkpoint, or the beginning."""
        latest, engine = self.store.latest(), self.policy.engine
        schedule = {**asdict(self.config.optimizer), "total_steps": self.r.steps * self.r.minibatches}
        facts: dict[str, Any] = {"lr_schedule": schedule, "config_sha256": self.context.config.fingerprint()}
        if latest is None:
            self.metrics.truncate_after(-1)
            counts = dict.fromkeys(("lost", "flat", "refilled"), 0)
            data = {**self.order.state_dict(), "work": dict.fromkeys(WORK, 0), **counts, "ahead": None}
            return TrainState(stage=self.stage.path.name, data=data, **facts)
        loaded = self.store.load(
            latest, engine.chunks, engine.optimizer, engine.scheduler, data_fingerprint=self.order.state.fingerprint
        )
        apply_settings(self.config, engine.optimizer, engine.scheduler)
        self.order.load_state_dict({name: loaded.state.data[name] for name in SamplerState.__dataclass_fields__})
        self.metrics.truncate_after(loaded.state.step)
        self.context.say(f"resumed from {latest.folder} (step {loaded.state.step} of {self.r.steps})")
        return replace(loaded.state, **facts)

    # ---------------------------------------------------------------- the loop

    def train(self) -> dict[str, Any]:
        """Draws, steps, measurements and checkpoints; returns the stage's result."""
        r = self.r
        with ExitStack() as held:
            held.enter_context(self.drawing)
            held.enter_context(self.metrics)
            name, main, first = self.stage.path.name, self.parallel.is_main, self.state.step
            progress = held.enter_context(Progress(r.steps, name, main, first))
            if first == 0:
                self._validate(progress)
            under_way = self._order_drawn_ahead() or self._order(first + 1, self.state.data["consumed"])
            while under_way:
                drawn = self.drawing.collect()
                under_way = r.draw_ahead and self._order(drawn.ask.block.last + 1, drawn.draw.position)
                self._learn(drawn, progress)
                # What older weights drew must be on record before newer ones are saved.
                self.drawing.settle()
                self._after_draw(len(drawn.ask.block.steps), progress)
                under_way = under_way or self._order(self.state.step + 1, self.state.data["consumed"])
            self._report(self.store.drain(), progress)
        return self._result()

    def _order(self, first: int, position: int) -> bool:
        """Have the groups of the steps from `first` on drawn with the weights as they are; whether there are any."""
        block = next_block(first, self.r.draw_steps, self.r.steps, self.state.step)
        if block is not None:
            self.drawing.order(Ask(block, position), self.state.step)
        ahead = note(block, self.settings) if self.r.draw_ahead else None
        self.state = replace(self.state, data={**self.state.data, "ahead": ahead})
        return block is not None

    def _order_drawn_ahead(self) -> bool:
        """After a resume: have the groups read back that were on their way; whether there are any."""
        block = noted(self.state.data.get("ahead"), self.settings, self.r.steps, self.context.say)
        if block is not None:
            self.drawing.order(Ask(block, self.state.data["consumed"]), self.state.step)
        return block is not None

    def _after_draw(self, steps: int, progress: Progress) -> None:
        """Checkpoints, and the wish of somebody outside that the stage saves and leaves."""
        step, interval, last = self.state.step, self.r.checkpoint_interval, self.r.steps
        due = step == last or step // interval > (step - steps) // interval
        if due:
            self._report(self._save(), progress)
        self._report(self.store.poll(), progress)
        if step < last and (reason := self.context.interrupt.requested(step)):
            self.context.interrupt.beat("save", self.config.checkpoint.timeout_s)
            self._report(None if due else self._save(), progress)
            self._report(self.store.drain(), progress)
            raise reason

    def _learn(self, drawn: Drawn, progress: Progress) -> None:
        """The steps that were drawn for."""
        data = {**self.state.data, "consumed": drawn.draw.position}
        self.state = replace(self.state, rollout_round=self.state.rollout_round + 1, data=data)
        for step in drawn.ask.block.steps:
            self._step(step, drawn, progress)
            idle = replace(drawn.draw, tokens=0, forward_passes=0, judge_seconds=0.0, refilled=0)
            drawn = replace(drawn, draw=idle, seconds=0.0, walls=dict.fromkeys(drawn.walls, 0.0))

    def _add_up(self, values: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(self.parallel.group("dp"), values, "figures of the answers")

    # ---------------------------------------------------------------- one step

    def _step(self, step: int, drawn: Drawn, progress: Progress) -> None:
        """Update, count, log, measure."""
        draw, lag = drawn.draw, step - 1 - drawn.ask.block.version
        start, kept, idle = time.monotonic(), draw.kept[step], draw.flat[step]
        everything = sorted([*kept, *idle], key=lambda g: g.position)
        figures = AnswerFigures.of(everything, flat(everything, self.r), self.r).reduced(self._add_up)
        # By slot and not by number among those kept: a minibatch holds the same tasks in every layout.
        parts = [[g for g in kept if g.slot % self.r.minibatches == m] for m in range(self.r.minibatches)]
        sequences = [answer_sequences(part, self.r, self.policy.share) for part in parts]
        updated = self.policy.update(sequences, (step - 1) * self.r.minibatches + 1)
        work = (draw.tokens, draw.forward_passes, updated.score_tokens, updated.train_tokens, updated.tokens)
        summed = self._add_up(torch.tensor((*work, updated.loss_tokens), dtype=torch.float64))
        self._count(updated, summed[:-1], figures, draw.refilled)
        updating = time.monotonic() - start - updated.score_seconds
        walls = {
            **drawn.walls,
            "score_seconds": updated.score_seconds,
            "update_seconds": updating,
            "step_seconds": drawn.seconds + updated.score_seconds + updating,
        }
        self._log(step, lag, updated, round(float(summed[-1])), figures, walls, progress)
        self._show(step, everything)
        interval = self.r.eval_interval
        if step == self.r.steps or (interval and step % interval == 0):
            self._validate(progress)

    def _count(self, updated: Updated, work: torch.Tensor, figures: AnswerFigures, refilled: int) -> None:
        state, data, sums = self.state, self.state.data, figures.sums
        total = {name: data["work"][name] + round(w) for name, w in zip(WORK, work.tolist(), strict=True)}
        skipped = sum(result.skipped for result in updated.results)
        self.state = replace(
            state,
            step=state.step + 1,
            tokens=total["sequence_tokens"],
            samples=state.samples + round(sums["answers"]),
            skipped_steps=state.skipped_steps + skipped,
            data={
                **data,
                "work": total,
                "lost": data["lost"] + round(sums["lost"]),
                "flat": data["flat"] + round(sums["flat"]),
                "refilled": data["refilled"] + refilled,
            },
        )
        self.skipped_in_a_row = self.skipped_in_a_row + skipped if skipped else 0
        if self.skipped_in_a_row > self.config.train.max_skipped_steps:
            raise RuntimeError(
                f"{self.skipped_in_a_row} updates in a row were skipped for a NaN or infinity (the last at step "
                f"{self.state.step}); lower rlvr.lr or look at the messages above"
            )

    def _log(
        self,
        step: int,
        lag: int,
        updated: Updated,
        tokens: int,
        figures: AnswerFigures,
        walls: dict[str, float],
        progress: Progress,
    ) -> None:
        values, results, data = figures.metrics(), updated.results, self.state.data
        # What has no lag differs from the engine's log-probs by rounding alone, before the first update.
        gap = {"rollout_gap": results[0].monitors["rollout_gap"]} if lag == 0 else {}
        if self.r.kl_coefficient:
            gap["reference_kl"] = float(np.mean([r.components[REFERENCE] for r in results]))
        self.metrics.log(
            step,
            **values,
            **gap,
            loss=float(np.mean([r.loss for r in results])),
            policy_loss=float(np.mean([r.components[ACTION] for r in results])),
            clipped=sum(r.monitors["clipped"] for r in results) / tokens if tokens else 0.0,
            loss_tokens=tokens,
            lag=lag,
            lr=results[-1].lr,
            grad_norm=max(r.grad_norm for r in results),
            skipped_steps=self.state.skipped_steps,
            samples=self.state.samples,
            lost_answers=data["lost"],
            refilled=data["refilled"],
            rollout_tokens=data["work"]["rollout_tokens"] / self.drawing_replicas,
            forward_passes=data["work"]["forward_passes"] / self.drawing_replicas,
            **{name: value for result in results for name, value in result.fp8.items()},
            **walls,
        )
        seconds = walls["step_seconds"]
        progress.update(step, pass_rate=values["pass_rate"], seconds=seconds, idle=idle_of(walls))

    # ---------------------------------------------------------------- measurements, checkpoints, result

    def _show(self, step: int, groups: Sequence[AnswerGroup]) -> None:
        """Some groups of some steps, for people."""
        if step not in (1, self.r.steps) and step % -(-self.r.steps // SHOWN_MOMENTS):
            return
        train, tokenizer = self.inputs.tasks.train, self.basis.tokenizer
        shown = groups[:SHOWN_GROUPS]
        records = [sample_record(g, train[g.task], g.rewards(self.r).tolist(), tokenizer) for g in shown]
        write_samples(self.parallel, self.stage.path / "data" / SAMPLES, step, records, SHOWN_GROUPS)

    def _validate(self, progress: Progress) -> None:
        """Pass rate of the held-out tasks with the weights as they are, logged at the current step."""
        if not self.inputs.tasks.validation:
            return
        figures, work = self.drawing.measure(self.state.step)
        total = {name: value + work.get(name, 0) for name, value in self.state.data["work"].items()}
        self.state = replace(self.state, data={**self.state.data, "work": total})
        self.metrics.log(self.state.step, **figures)
        rate = figures["validation_pass_rate"]
        progress.message(f"{self.stage.path.name}  held-out tasks at step {self.state.step}: {rate:.1%} pass")

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
        work = data["work"]
        count = partial(flops, self.context.architecture, context=self.basis.longest_row / 2)
        forward = count(work["rollout_tokens"] + work["scored_tokens"], training=False)
        return {
            "checkpoint": str(last.folder.relative_to(self.context.folder.path)),
            "step": self.state.step,
            "parameters_sha256": last.parameters_sha256,
            "tokens": self.state.tokens,
            "samples": self.state.samples,
            "rollout_tokens": work["rollout_tokens"],
            "lost_answers": data["lost"],
            "groups_flat": data["flat"],
            "refilled": data["refilled"],
            "flops": forward + count(work["trained_tokens"], training=True),
        }
