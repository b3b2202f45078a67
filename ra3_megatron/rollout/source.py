"""Where the E-step's rollouts come from: drawn with the policy in training and recorded, or read back after a crash."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from ra3_megatron.checkpoint.capture import synchronise_parameters
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.ra3 import LatentConfig
from ra3_megatron.data.latent import ThinkTokens
from ra3_megatron.data.trajectory import Trajectory
from ra3_megatron.parallel.collectives import broadcast_object, raise_everywhere
from ra3_megatron.parallel.groups import Parallel
from ra3_megatron.rollout.engine import RolloutEngine
from ra3_megatron.rollout.experience import Member
from ra3_megatron.rollout.hindsight import from_hindsight, hindsight_views
from ra3_megatron.rollout.interleaved import Rollout, RolloutSettings, Uniforms, rollout
from ra3_megatron.rollout.ledger import Draw, Entry, RolloutKey, RolloutLedger


@dataclass(frozen=True)
class Snippet:
    """A place in the work of this replica."""

    step: int
    """Optimizer step that uses the rollouts, from 1."""
    slot: int
    """Number among the step's snippets, over all replicas."""
    number: int
    """Which trajectory of the corpus."""


@dataclass(frozen=True)
class Sampling:
    """What the members of a draw are drawn from, as the policy sees it."""

    settings: RolloutSettings
    """How thoughts are sampled."""
    think_tokens: ThinkTokens
    """Those of the corpus."""
    hindsight: bool
    """Whether the policy sees the whole text first."""

    @classmethod
    def of(cls, config: LatentConfig, think_tokens: ThinkTokens) -> "Sampling":
        """From the configuration."""
        settings = RolloutSettings(config.temperature, config.max_latent_tokens, config.chunk_tokens)
        return cls(settings, think_tokens, config.posterior == "hindsight")

    def shown(self, experts: Sequence[Trajectory], max_tokens: int) -> list[Trajectory]:
        """The texts as rows of the policy begin with them; UserError for one that is too long."""
        if not self.hindsight:
            return list(experts)
        return hindsight_views(experts, self.think_tokens, max_tokens, self.settings.max_latent_tokens)

    def draw(
        self, engine: RolloutEngine, experts: Sequence[Trajectory], group_size: int, uniforms: Uniforms
    ) -> list[Rollout]:
        """Rollouts as the policy draws them, in order of (trajectory, member)."""
        shown = self.shown(experts, engine.max_tokens)
        return rollout(engine, shown, group_size, uniforms, self.settings, self.think_tokens)

    def member(self, slot: int, expert: Trajectory, drawn: Rollout) -> Member:
        """The rollout with its form after the text so far alone."""
        plain = from_hindsight(drawn, expert) if self.hindsight else drawn
        return Member(slot, expert, drawn, plain)


class RolloutSource:
    """Groups of rollouts for the coming steps of one data replica.

    `chunks` are the model, `engine` samples from them. The first process of a replica keeps the `ledger`
    (none on the others). All processes of a replica make the same calls.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        engine: RolloutEngine,
        parallel: Parallel,
        sampling: Sampling,
        group_size: int,
        ledger: RolloutLedger | None,
    ) -> None:
        self._chunks, self._engine, self._parallel = list(chunks), engine, parallel
        self._sampling, self._group_size, self._ledger = sampling, group_size, ledger

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ledger is not None:
            self._ledger.close()

    def draw(
        self,
        em_round: int,
        version: int,
        snippets: Sequence[Snippet],
        experts: Sequence[Trajectory],
        uniforms: Callable[[], Uniforms],
        weights: int | None = None,
    ) -> tuple[dict[int, list[Member]], Draw]:
        """Members by step of one draw with the weights that have taken `version` steps, and what it cost when it was
        made.

        `snippets` in order of (step, slot), with their `experts`; `uniforms` makes the random numbers of the call. The
        same draw in the ledger takes its place. `weights`: steps taken by the weights there are, where these may be
        newer than the ones asked for; the draw must then be in the ledger: raises UserError.
        """
        # Of all replicas, so before each looks into its own record: after a crash one may have the draw, another not.
        synchronise_parameters(self._chunks)
        keys = [RolloutKey(em_round, s.step, s.slot, m) for s in snippets for m in range(self._group_size)]
        numbers = [i for i in range(len(snippets)) for _ in range(self._group_size)]
        found, cost = self._recorded(em_round, version, keys, numbers, experts)
        if found is None:
            with raise_everywhere(self._parallel.group("mp"), "recorded rollouts"):
                self._refuse_newer(version, weights)
            found, cost = self._drawn(em_round, version, keys, snippets, experts, uniforms())
        by_step: dict[int, list[Member]] = {s.step: [] for s in snippets}
        for i, one in zip(numbers, found, strict=True):
            by_step[snippets[i].step].append(self._sampling.member(snippets[i].slot, experts[i], one))
        return by_step, cost

    def _recorded(
        self,
        em_round: int,
        version: int,
        keys: Sequence[RolloutKey],
        numbers: Sequence[int],
        experts: Sequence[Trajectory],
    ) -> tuple[list[Rollout] | None, Draw]:
        """The draw as the ledger has it; none where it lacks a rollout or has it of other weights."""
        nothing = Draw(em_round, version + 1, version, 0)
        found: list[Rollout] | None = None
        cost = nothing
        ledger = self._ledger
        replica = self._parallel.group("mp")
        with raise_everywhere(replica, "recorded rollouts"):
            if ledger is not None and all(k in ledger and ledger.weights_version(k) == version for k in keys):
                shown = self._sampling.shown(experts, self._engine.max_tokens)
                found = [ledger.read(key, shown[i]) for key, i in zip(keys, numbers, strict=True)]
                cost = ledger.draw(em_round, version + 1) or nothing
        return broadcast_object(replica, (found, cost), "recorded rollouts")

    def _refuse_newer(self, version: int, weights: int | None) -> None:
        if weights not in (None, version) and self._ledger is not None:
            raise UserError(
                f"{self._ledger.folder} lacks rollouts that the weights of step {version} gave, and the newest "
                f"checkpoint is of step {weights}: they cannot be drawn again; restore the file, or delete the "
                f"checkpoints after step {version}: the run then goes on from an older one, or from its start"
            )

    def _drawn(
        self,
        em_round: int,
        version: int,
        keys: Sequence[RolloutKey],
        snippets: Sequence[Snippet],
        experts: Sequence[Trajectory],
        uniforms: Uniforms,
    ) -> tuple[list[Rollout], Draw]:
        """Draw, record, and count."""
        counters = self._engine.counters
        before = (counters.forward_passes, counters.tokens, counters.rolled_back)
        self._engine.weights_version = version
        found = self._sampling.draw(self._engine, experts, self._group_size, uniforms)
        after = (counters.forward_passes, counters.tokens, counters.rolled_back)
        passes, tokens, rolled_back = (b - a for a, b in zip(before, after, strict=True))
        cost = Draw(em_round, version + 1, version, len(found), passes, tokens, rolled_back)
        with raise_everywhere(self._parallel.group("mp"), "record of rollouts"):
            self._record(keys, snippets, found, cost)
        return found, cost

    def _record(
        self, keys: Sequence[RolloutKey], snippets: Sequence[Snippet], found: Sequence[Rollout], cost: Draw
    ) -> None:
        if self._ledger is not None:
            numbers = [s.number for s in snippets for _ in range(self._group_size)]
            self._ledger.append([Entry(*entry) for entry in zip(keys, numbers, found, strict=True)])
            self._ledger.commit(cost)


def snippets_of(steps: Sequence[int], own: slice, numbers: Callable[[int], np.ndarray]) -> Iterator[Snippet]:
    """This replica's snippets of some steps: slots `own` of what `numbers` gives for each step."""
    for step in steps:
        every = numbers(step)
        for slot in range(len(every))[own]:
            yield Snippet(step, slot, int(every[slot]))
