"""Groups of judged answers for the coming steps; tasks that teach nothing are replaced by the next ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ra3_megatron.data.sampler import WindowSampler
from ra3_megatron.parallel.collectives import all_reduce_sum
from ra3_megatron.rollout.groups import AnswerGroup, flat
from ra3_megatron.stages.rlvr_answers import AnswerSource, Asked
from ra3_megatron.stages.rlvr_policy import RlvrBasis, seed_of


@dataclass(frozen=True)
class Draw:
    """Judged groups for the coming steps, of this replica."""

    kept: dict[int, list[AnswerGroup]]
    """By step: what is learned from, in order of slots."""
    flat: dict[int, list[AnswerGroup]]
    """By step: what taught nothing."""
    position: int
    """Place in the order of the tasks after the last one that was asked."""
    tokens: int
    """Fed through the model when the answers were drawn."""
    forward_passes: int
    judge_seconds: float
    refilled: int
    """Places, over all replicas, that got another task."""


class GroupSource:
    """Asks tasks in their `order` until every place of the coming steps has a group that teaches something.

    A group teaches nothing when all its answers earned the same (dynamic sampling, DAPO). The replica of a place keeps
    it: which tasks are asked, and with which random numbers, depends on no layout.
    """

    def __init__(self, basis: RlvrBasis, source: AnswerSource, order: WindowSampler) -> None:
        self._basis, self._source, self._order = basis, source, order
        self._config, self._train = basis.config.rlvr, basis.tasks.train
        self._seed = seed_of(basis.config.run.seed, "answers")

    def draw(self, version: int, steps: Sequence[int], position: int, weights: int) -> Draw:
        """Groups for `steps` with the weights that have taken `version` steps, from `position` of the order on.

        `weights`: steps taken by the weights there are; where they are newer, every answer must be on record. Places
        are filled again up to `rlvr.max_refills` times. Collective.
        """
        places = [(step, slot) for step in steps for slot in range(self._config.prompts_per_step)]
        kept: dict[int, list[AnswerGroup]] = {step: [] for step in steps}
        idle: dict[int, list[AnswerGroup]] = {step: [] for step in steps}
        tokens = passes = refilled = 0
        self._source.synchronise()
        waited = 0.0
        for attempt in range(1 + self._config.max_refills):
            refilled += len(places) * (attempt > 0)
            numbers = self._order.windows(position, len(places)).tolist()
            mine = [i for i, (_, slot) in enumerate(places) if slot in self._basis.own_slots]
            asked = [Asked(position + i, self._train[numbers[i]]) for i in mine]
            drawn = self._source.draw(version, asked, self._config.group_size, self._seed, weights)
            groups = [
                AnswerGroup.of(places[i][1], position + i, numbers[i], answers, verdicts)
                for i, answers, verdicts in zip(mine, drawn.answers, drawn.verdicts, strict=True)
            ]
            again = torch.zeros(len(places), dtype=torch.float64)
            for i, group, useless in zip(mine, groups, flat(groups, self._config).tolist(), strict=True):
                (idle if useless else kept)[places[i][0]].append(group)
                again[i] = useless
            tokens, passes = tokens + drawn.cost.tokens, passes + drawn.cost.forward_passes
            waited += drawn.judge_seconds
            position += len(places)
            again = all_reduce_sum(self._basis.parallel.group("dp"), again, "groups that teach nothing")
            places = [place for place, useless in zip(places, again.tolist(), strict=True) if useless]
            if not places:
                break
        for found in kept.values():
            found.sort(key=lambda g: g.slot)
        return Draw(kept, idle, position, tokens, passes, waited, refilled)


def joined(draws: Sequence[Draw], own: range, first: bool) -> Draw:
    """From what several replicas drew, the places `own` of every step; the work counts on the `first` replica alone."""
    kept: dict[int, list[AnswerGroup]] = {step: [] for step in draws[0].kept}
    idle: dict[int, list[AnswerGroup]] = {step: [] for step in draws[0].kept}
    for draw in draws:
        for mine, theirs in ((kept, draw.kept), (idle, draw.flat)):
            for step, groups in theirs.items():
                mine[step] += [g for g in groups if g.slot in own]
    for step in kept:
        kept[step].sort(key=lambda g: g.slot)
        idle[step].sort(key=lambda g: g.position)
    return Draw(
        kept,
        idle,
        position=draws[0].position,
        tokens=sum(d.tokens for d in draws) if first else 0,
        forward_passes=sum(d.forward_passes for d in draws) if first else 0,
        judge_seconds=max(d.judge_seconds for d in draws),
        refilled=draws[0].refilled,
    )
