"""The drawing side of RLVR: judged groups for the coming steps and measurements, from one model.

Where every replica trains and draws, the model is the one in training and a draw happens when it is ordered; where some
replicas only draw (`parallel.generation_replicas`), it happens there while training goes on.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, Self

import torch

from ra3_megatron.config.control import Interrupted
from ra3_megatron.parallel.collectives import raise_everywhere
from ra3_megatron.parallel.split import Side
from ra3_megatron.reward.judge import Judge
from ra3_megatron.rollout.factory import build_rollout_engine
from ra3_megatron.stages.ahead import Block
from ra3_megatron.stages.policy import frozen
from ra3_megatron.stages.rlvr_answers import AnswerSource
from ra3_megatron.stages.rlvr_groups import Draw, GroupSource, joined
from ra3_megatron.stages.rlvr_policy import RlvrBasis, seed_of
from ra3_megatron.stages.rlvr_validation import Validation
from ra3_megatron.stages.run_folder import StageFolder
from ra3_megatron.stages.split import Generators, serve

Measured = tuple[dict[str, float], dict[str, int]]
"""Figures of the held-out tasks by their names in the metrics' schema, and the work they took over all replicas."""


@dataclass(frozen=True)
class Ask:
    """A draw of answers."""

    block: Block
    """For which steps, with which weights."""
    position: int
    """Place in the order of the tasks from which on they are asked."""


@dataclass(frozen=True)
class Measure:
    """A measurement of the held-out tasks with the weights that have taken `step` steps."""

    step: int


@dataclass(frozen=True)
class Drawn:
    """Groups of this replica for some steps, and what a clock says of them."""

    ask: Ask
    draw: Draw
    seconds: float
    """Time that the loop spent on it: drawing, or waiting for those who draw."""
    walls: dict[str, float]
    """By their names in the metrics' schema."""


class Drawing(Protocol):
    """Where the loop's groups and measurements come from. Every process of the side that trains makes the same calls.

    One draw is ordered and collected at a time. Leaving the block in good order ends it.
    """

    def __enter__(self) -> Self: ...
    def __exit__(self, kind: Any, error: Any, trace: Any) -> None: ...

    def order(self, ask: Ask, weights: int) -> None:
        """Have groups drawn; the weights in training have taken `weights` steps. Where the ones asked for are older,
        all answers must be on record."""

    def settle(self) -> None:
        """Return when what is ordered is on record."""

    def collect(self) -> Drawn:
        """What was ordered."""

    def measure(self, step: int) -> Measured:
        """The held-out tasks with the weights in training, which have taken `step` steps."""


class Drawer:
    """Draws from `chunks`: engine, judge, records. All processes of its world make the same calls."""

    def __init__(self, basis: RlvrBasis, chunks: list[torch.nn.Module], stage: StageFolder) -> None:
        self.basis, self.parallel, self._chunks, self._stage = basis, basis.parallel, chunks, stage
        config, architecture = basis.config, basis.context.architecture
        self._engine = build_rollout_engine(config, chunks, architecture, self.parallel, basis.longest_row)
        if self.parallel.rank == 0:
            print(self._engine.description, flush=True)

    def __enter__(self) -> Self:
        basis, config = self.basis, self.basis.config
        with ExitStack() as held:
            judge = self._judge(held)
            source = partial(self._source, judge)
            answers = held.enter_context(source("answers", "training"))
            self._groups = GroupSource(basis, answers, basis.sampler())
            tasks, members = basis.tasks.validation, config.rlvr.validation_samples
            seed = seed_of(config.run.seed, "validation")
            held_out = held.enter_context(source("validation", "validation"))
            self._validation = Validation(tasks, members, seed, held_out, self.parallel)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _judge(self, held: ExitStack) -> Judge | None:
        """The judge of this replica, on its first process."""
        with raise_everywhere(self.parallel.world, "start of the judge"):
            if self.parallel.group("mp").rank != 0:
                return None
            return held.enter_context(Judge(self.basis.config.judge, training=True))

    def _source(self, judge: Judge | None, folder: str, purpose: str) -> AnswerSource:
        basis = self.basis
        return AnswerSource(
            self._chunks,
            self._engine,
            self.parallel,
            basis.tokenizer,
            basis.sampling,
            basis.config.rlvr.reward == "fraction",
            judge,
            self._stage.path / "data" / folder,
            f"{purpose} {basis.settings}",
        )

    def draw(self, ask: Ask, weights: int) -> Draw:
        """This replica's groups."""
        self.parallel.mark(f"answers of step {ask.block.first}")
        return self._groups.draw(ask.block.version, ask.block.steps, ask.position, weights)

    def measure(self, step: int) -> Measured:
        """Figures over all replicas of this world."""
        self.parallel.mark(f"held-out tasks at step {step}")
        return self._validation.measure(step)

    def perform(self, task: Ask | Measure, version: int) -> Draw | Measured:
        """What an order of the training side asks for."""
        return self.draw(task, version) if isinstance(task, Ask) else self.measure(task.step)


class OwnDrawing:
    """`Drawing` on the model in training."""

    def __init__(self, drawer: Drawer) -> None:
        self._drawer, self._waiting = drawer, None  # type: Drawer, Drawn | None

    def __enter__(self) -> Self:
        self._drawer.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._drawer.__exit__()

    def order(self, ask: Ask, weights: int) -> None:
        """See `Drawing.order`."""
        start = time.monotonic()
        draw = self._drawer.draw(ask, weights)
        seconds = time.monotonic() - start
        walls = {"rollout_seconds": seconds - draw.judge_seconds, "judge_seconds": draw.judge_seconds}
        self._waiting = Drawn(ask, draw, seconds, walls)

    def settle(self) -> None:
        """See `Drawing.settle`."""

    def collect(self) -> Drawn:
        """See `Drawing.collect`."""
        drawn, self._waiting = self._waiting, None
        assert drawn is not None, "nothing was ordered"
        return drawn

    def measure(self, step: int) -> Measured:
        """See `Drawing.measure`."""
        return self._drawer.measure(step)


class OthersDrawing:
    """`Drawing` on replicas that only draw."""

    def __init__(self, basis: RlvrBasis, generators: Generators) -> None:
        self._basis, self._generators = basis, generators
        self._ordered: Ask | None = None
        self._there: Drawn | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None or isinstance(error, Interrupted):
            self._generators.end(error)

    def order(self, ask: Ask, weights: int) -> None:
        """See `Drawing.order`."""
        assert self._ordered is None, "a draw is under way"
        self._generators.order(ask, weights)
        self._ordered = ask

    def settle(self) -> None:
        """See `Drawing.settle`."""
        if self._ordered is None:
            return
        ask, self._ordered, parallel = self._ordered, None, self._basis.parallel
        select = partial(joined, own=self._basis.own_slots, first=parallel.data_rank == 0)
        found = self._generators.collect(f"answers of step {ask.block.first}", select)
        walls = {
            "rollout_seconds": found.seconds - found.results.judge_seconds,
            "judge_seconds": found.results.judge_seconds,
            "generator_idle_seconds": found.idle_seconds,
        }
        self._there = Drawn(ask, found.results, 0.0, walls)

    def collect(self) -> Drawn:
        """See `Drawing.collect`."""
        self.settle()
        drawn, self._there = self._there, None
        assert drawn is not None, "nothing was ordered"
        walls = {**drawn.walls, **self._generators.waited()}
        return replace(drawn, seconds=walls["trainer_idle_seconds"] + walls["transfer_seconds"], walls=walls)

    def measure(self, step: int) -> Measured:
        """See `Drawing.measure`."""
        self.settle()
        self._generators.order(Measure(step), step)
        return self._generators.collect(f"held-out tasks at step {step}", lambda results: results[0]).results


def make_drawing(basis: RlvrBasis, chunks: list[torch.nn.Module], stage: StageFolder, side: Side | None) -> Drawing:
    """From `chunks`, which are in training, or by others where the world is in two sides."""
    if side is None:
        return OwnDrawing(Drawer(basis, chunks, stage))
    return OthersDrawing(basis, Generators(basis.context, side, chunks))


def generate(basis: RlvrBasis, stage: StageFolder, side: Side) -> None:
    """What a process does that only draws."""
    chunks = frozen(basis.blank())
    with Drawer(basis, chunks, stage) as drawer:
        serve(basis.context, side, chunks, drawer.perform, "answers")
