"""The drawing side of the E-step: rollouts for the coming steps and for the probe, from one model.

Where every replica trains and draws, the model is the one in training and a draw happens when it is ordered; where some
replicas only draw (`parallel.generation_replicas`), it happens there while training goes on. Rewards are the business
of those that train.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch

from ra3_megatron.checkpoint.capture import synchronise_parameters
from ra3_megatron.config.control import Interrupted
from ra3_megatron.data.trajectory import Trajectory
from ra3_megatron.parallel.collectives import raise_everywhere
from ra3_megatron.parallel.groups import Parallel
from ra3_megatron.parallel.phases import phase
from ra3_megatron.parallel.split import Side
from ra3_megatron.rollout.experience import Member
from ra3_megatron.rollout.factory import build_rollout_engine
from ra3_megatron.rollout.ledger import Draw, RolloutLedger, packed, unpacked
from ra3_megatron.rollout.source import RolloutSource, Snippet, snippets_of
from ra3_megatron.stages.ahead import Block
from ra3_megatron.stages.policy import Basis, frozen
from ra3_megatron.stages.split import Generators, serve

_SELECTION = 20250926
"""Seed of the choice of the probe's snippets: the same in every round and arm."""


@dataclass(frozen=True)
class ProbeAsk:
    """The probe's snippets with the weights that have taken `step` steps."""

    step: int


@dataclass(frozen=True)
class Drawn:
    """Rollouts of this replica for some steps, and what a clock says of them."""

    block: Block
    by_step: dict[int, list[Member]]
    cost: Draw
    seconds: float
    """Time that the loop spent on it: drawing, or waiting for those who draw."""
    walls: dict[str, float]
    """By their names in the metrics' schema."""


@dataclass(frozen=True)
class Probed:
    """Rollouts of this replica's share of the probe, and what they cost it."""

    members: list[Member]
    tokens: int
    forward_passes: int


@dataclass(frozen=True)
class _Sent:
    """A rollout on its way from one process to another: step (0 for the probe), slot, and `ledger.packed`."""

    step: int
    slot: int
    header: dict[str, Any]
    content: bytes


@dataclass(frozen=True)
class _Parcel:
    """What one generating replica drew."""

    rollouts: list[_Sent]
    tokens: int
    forward_passes: int


class Work:
    """Which snippets are whose, on this process: those of a step, and those of the probe."""

    def __init__(self, basis: Basis, em_round: int) -> None:
        self.basis, self.em_round, self.snippets = basis, em_round, basis.sampler(em_round)
        corpus, wanted = basis.corpus, basis.config.variational.probe_snippets
        # Held-out snippets, of the training part where there are none.
        self.probe_store = corpus.validation if len(corpus.validation) else corpus.train
        order = np.random.default_rng(_SELECTION).permutation(len(self.probe_store))
        self.probe_ids: list[int] = sorted(order[:wanted].tolist())

    def numbers(self, step: int) -> np.ndarray:
        """Snippets of a step over all replicas, int64 [snippets_per_step]."""
        count = self.basis.config.variational.snippets_per_step
        return self.snippets.windows((step - 1) * count, count)

    def of_steps(self, steps: Sequence[int]) -> list[Snippet]:
        """This replica's snippets of some steps."""
        return list(snippets_of(steps, self.basis.own_slots, self.numbers))

    def experts(self, snippets: Iterable[Snippet]) -> list[Trajectory]:
        """Their texts."""
        return [self.basis.corpus.train[s.number] for s in snippets]

    def of_probe(self, parallel: Parallel) -> list[int]:
        """Slots of the probe that are this replica's."""
        return np.array_split(np.arange(len(self.probe_ids)), parallel.sizes.data)[parallel.data_rank].tolist()

    def probe_experts(self, slots: Sequence[int]) -> list[Trajectory]:
        """Their texts."""
        return [self.probe_store[self.probe_ids[slot]] for slot in slots]


class Drawing(Protocol):
    """Where the loop's rollouts come from. Every process of the side that trains makes the same calls.

    One draw is ordered and collected at a time. Leaving the block in good order ends it.
    """

    def __enter__(self) -> Self: ...
    def __exit__(self, kind: Any, error: Any, trace: Any) -> None: ...

    def order(self, block: Block, weights: int) -> None:
        """Have rollouts drawn; the weights in training have taken `weights` steps. Where the ones asked for are older,
        all rollouts must be on record."""

    def settle(self) -> None:
        """Return when what is ordered is on record."""

    def collect(self) -> Drawn:
        """What was ordered."""

    def probe(self, step: int) -> Probed:
        """The probe with the weights in training, which have taken `step` steps."""


class Drawer:
    """Draws from `chunks`: engine and record. All processes of its world make the same calls."""

    def __init__(self, work: Work, chunks: list[torch.nn.Module], folder: Path) -> None:
        self.work, self.basis, self.parallel, self._chunks = work, work.basis, work.basis.parallel, chunks
        config, architecture, p = self.basis.config, self.basis.context.architecture, self.parallel
        self.engine = build_rollout_engine(config, chunks, architecture, p, self.basis.max_tokens)
        if p.rank == 0:
            print(self.engine.description, flush=True)
        shard = f"{p.data_rank:05d}-of-{p.sizes.data:05d}"
        with raise_everywhere(p.world, "rollout ledger"):
            settings = self.basis.settings(work.em_round)
            ledger = RolloutLedger(folder, shard, settings) if p.group("mp").rank == 0 else None
        self._members = config.variational.group_size
        self._source = RolloutSource(chunks, self.engine, p, self.basis.sampling, self._members, ledger)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._source.__exit__()

    def draw(self, block: Block, weights: int) -> tuple[dict[int, list[Member]], Draw]:
        """This replica's members by step, and what they cost when they were drawn."""
        self.parallel.mark(f"rollouts of step {block.first}")
        work, count = self.work, self.basis.config.variational.snippets_per_step
        snippets = work.of_steps(block.steps)
        places = [s.step * count + s.slot for s in snippets]
        uniforms = partial(self.basis.uniforms, f"round {work.em_round}", places)
        experts = work.experts(snippets)
        with phase("rollout"):
            return self._source.draw(work.em_round, block.version, snippets, experts, uniforms, weights)

    def probe(self, step: int) -> Probed:
        """This replica's share."""
        counters, basis, slots = self.engine.counters, self.basis, self.work.of_probe(self.parallel)
        tokens, passes = counters.tokens, counters.forward_passes
        experts = self.work.probe_experts(slots)
        synchronise_parameters(self._chunks)
        self.engine.weights_version = step
        uniforms = basis.uniforms("probe", [self.work.probe_ids[slot] for slot in slots])
        drawn = basis.sampling.draw(self.engine, experts, self._members, uniforms)
        members = [basis.sampling.member(slots[r.number], experts[r.number], r) for r in drawn]
        return Probed(members, counters.tokens - tokens, counters.forward_passes - passes)

    def perform(self, task: Block | ProbeAsk, version: int) -> _Parcel:
        """What an order of the training side asks for."""
        if isinstance(task, ProbeAsk):
            probed = self.probe(task.step)
            sent = [_Sent(0, m.slot, *packed(m.drawn)) for m in probed.members]
            return _Parcel(sent, probed.tokens, probed.forward_passes)
        by_step, cost = self.draw(task, version)
        sent = [_Sent(step, m.slot, *packed(m.drawn)) for step, members in by_step.items() for m in members]
        return _Parcel(sent, cost.tokens, cost.forward_passes)


class OwnDrawing:
    """`Drawing` on the model in training."""

    def __init__(self, drawer: Drawer) -> None:
        self.drawer = drawer
        self._waiting: Drawn | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.drawer.__exit__()

    def order(self, block: Block, weights: int) -> None:
        """See `Drawing.order`."""
        start = time.monotonic()
        by_step, cost = self.drawer.draw(block, weights)
        seconds = time.monotonic() - start
        self._waiting = Drawn(block, by_step, cost, seconds, {"rollout_seconds": seconds})

    def settle(self) -> None:
        """See `Drawing.settle`."""

    def collect(self) -> Drawn:
        """See `Drawing.collect`."""
        drawn, self._waiting = self._waiting, None
        assert drawn is not None, "nothing was ordered"
        return drawn

    def probe(self, step: int) -> Probed:
        """See `Drawing.probe`."""
        return self.drawer.probe(step)


class OthersDrawing:
    """`Drawing` on replicas that only draw."""

    def __init__(self, work: Work, generators: Generators) -> None:
        self._work, self._generators = work, generators
        self._ordered: Block | None = None
        self._there: Drawn | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None or isinstance(error, Interrupted):
            self.settle()
            self._generators.end(error)

    def order(self, block: Block, weights: int) -> None:
        """See `Drawing.order`."""
        assert self._ordered is None, "a draw is under way"
        self._generators.order(block, weights)
        self._ordered = block

    def settle(self) -> None:
        """See `Drawing.settle`."""
        if self._ordered is None:
            return
        block, self._ordered = self._ordered, None
        snippets = self._work.of_steps(block.steps)
        found = self._generators.collect(f"rollouts of step {block.first}", partial(_own, self._work.basis.own_slots))
        experts = {(s.step, s.slot): e for s, e in zip(snippets, self._work.experts(snippets), strict=True)}
        by_step: dict[int, list[Member]] = {step: [] for step in block.steps}
        for sent in found.results.rollouts:
            by_step[sent.step].append(self._member(sent, experts[sent.step, sent.slot]))
        count = sum(map(len, by_step.values()))
        parcel = found.results if self._work.basis.parallel.data_rank == 0 else _Parcel([], 0, 0)
        cost = Draw(self._work.em_round, block.first, block.version, count, parcel.forward_passes, parcel.tokens)
        walls = {"rollout_seconds": found.seconds, "generator_idle_seconds": found.idle_seconds}
        self._there = Drawn(block, by_step, cost, 0.0, walls)

    def _member(self, sent: _Sent, expert: Trajectory) -> Member:
        basis = self._work.basis
        (shown,) = basis.sampling.shown([expert], basis.max_tokens)
        return basis.sampling.member(sent.slot, expert, unpacked(sent.header, sent.content, shown))

    def collect(self) -> Drawn:
        """See `Drawing.collect`."""
        self.settle()
        drawn, self._there = self._there, None
        assert drawn is not None, "nothing was ordered"
        walls = {**drawn.walls, **self._generators.waited()}
        return replace(drawn, seconds=walls["trainer_idle_seconds"] + walls["transfer_seconds"], walls=walls)

    def probe(self, step: int) -> Probed:
        """See `Drawing.probe`."""
        self.settle()
        self._generators.order(ProbeAsk(step), step)
        slots = self._work.of_probe(self._work.basis.parallel)
        parcel = self._generators.collect("rollouts of the probe", partial(_own, slots)).results
        experts = dict(zip(slots, self._work.probe_experts(slots), strict=True))
        members = [self._member(sent, experts[sent.slot]) for sent in parcel.rollouts]
        first = self._work.basis.parallel.data_rank == 0
        return Probed(members, parcel.tokens * first, parcel.forward_passes * first)


def _own(slots: slice | Sequence[int], parcels: Sequence[_Parcel]) -> _Parcel:
    """Of what several replicas drew, the rollouts of some slots in order, and the work of all."""
    chosen = range(slots.start, slots.stop) if isinstance(slots, slice) else slots
    rollouts = [s for parcel in parcels for s in parcel.rollouts if s.slot in chosen]
    rollouts.sort(key=lambda s: (s.step, s.slot))  # stable: members stay in their order
    return _Parcel(rollouts, sum(p.tokens for p in parcels), sum(p.forward_passes for p in parcels))


def make_drawing(work: Work, chunks: list[torch.nn.Module], folder: Path, side: Side | None) -> Drawing:
    """From `chunks`, which are in training, or by others where the world is in two sides."""
    if side is None:
        return OwnDrawing(Drawer(work, chunks, folder))
    return OthersDrawing(work, Generators(work.basis.context, side, chunks))


def generate(work: Work, folder: Path, side: Side) -> None:
    """What a process does that only draws."""
    chunks = frozen(work.basis.blank())
    with Drawer(work, chunks, folder) as drawer:
        serve(work.basis.context, side, chunks, drawer.perform, "rollouts")
