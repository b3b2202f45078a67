"""Groups of judged answers: their rewards and advantages, and what the training engine learns from them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ra3_megatron.algo.groups import answer_weight, flat_groups, group_advantages, overlong_penalty
from ra3_megatron.config.rlvr import RlvrConfig
from ra3_megatron.config.sections import TrainConfig
from ra3_megatron.data.batch import TrainBatch, collate
from ra3_megatron.data.packing import TrainSequence
from ra3_megatron.parallel.collectives import all_reduce_max
from ra3_megatron.parallel.groups import Parallel
from ra3_megatron.rollout.answers import Judged
from ra3_megatron.rollout.completion import Completion
from ra3_megatron.rollout.windows import Windows, share_beginning
from ra3_megatron.training.actions import ACTION

ANSWERS = "answers"
"""Token weights whose global sum is the number of answers x `rlvr.max_tokens`: the divisor of `constant`."""
REFERENCE = "reference_kl"
UNIT = 16
"""Tokens of a process that windows are a multiple of, where FP8 wants no larger one."""
LOST = "lost"
"""Outcome of a program that could not be judged (`reward.problem.Outcome.LOST`)."""


@dataclass(frozen=True)
class AnswerGroup:
    """The judged answers to one task, those without a verdict left out."""

    slot: int
    """Number among the step's groups, over all replicas."""
    position: int
    """Place of the task in the endless order of the tasks."""
    task: int
    """Which task."""
    answers: tuple[Completion, ...] = field(repr=False)
    verdicts: tuple[Judged, ...] = field(repr=False)
    lost: int = 0
    """Answers left out: nobody could say whether they are right."""

    @classmethod
    def of(
        cls, slot: int, position: int, task: int, answers: Sequence[Completion], verdicts: Sequence[Judged]
    ) -> "AnswerGroup":
        """The group of all answers to a task; those that were lost are counted and left out."""
        kept = [(a, v) for a, v in zip(answers, verdicts, strict=True) if v.outcome != LOST]
        found = tuple(a for a, _ in kept), tuple(v for _, v in kept)
        return cls(slot, position, task, *found, lost=len(answers) - len(kept))

    def rewards(self, config: RlvrConfig) -> np.ndarray:
        """float64 [answers]."""
        whole = config.reward == "all"
        earned = np.array([float(v.ok) if whole else v.fraction for v in self.verdicts], dtype=np.float64)
        if config.overlong == "soft":
            lengths = torch.tensor([len(a.ids) for a in self.answers], dtype=torch.float64)
            earned -= overlong_penalty(lengths, config.max_tokens, config.overlong_buffer).numpy()
        return earned


def flat(groups: Sequence[AnswerGroup], config: RlvrConfig) -> np.ndarray:
    """Which groups teach nothing: all their answers earned the same, or fewer than two are left; bool [groups]."""
    rewards = np.concatenate([np.zeros(0), *(g.rewards(config) for g in groups)])
    sizes = torch.tensor([len(g.answers) for g in groups], dtype=torch.int64)
    owner = torch.repeat_interleave(torch.arange(len(groups)), sizes)
    return flat_groups(torch.from_numpy(rewards), owner, len(groups)).numpy()


def answer_sequences(groups: Sequence[AnswerGroup], config: RlvrConfig, share: bool = False) -> list[TrainSequence]:
    """Training sequences of all answers, in order: prompt and answer, with weights and extras as `config` says.

    One per answer; with `share` one per group, which holds the prompt once, and those of masked answers.
    Every group has two answers or more (ValueError). Answers that are masked keep their place in the group's mean, and
    in the divisor of `constant`, and have no weight.
    """
    if not groups:
        return []
    sizes = torch.tensor([len(g.answers) for g in groups])
    owner = torch.repeat_interleave(torch.arange(len(groups)), sizes)
    rewards = torch.from_numpy(np.concatenate([g.rewards(config) for g in groups]))
    advantages = group_advantages(rewards, owner, config.advantage).tolist()
    answers = [a for g in groups for a in g.answers]
    made = [_sequence(a, advantage, config) for a, advantage in zip(answers, advantages, strict=True)]
    if not share:
        return made
    shared, end = [], 0
    for group in groups:
        own, end = made[end : end + len(group.answers)], end + len(group.answers)
        prompt = group.answers[0].prompt.ids
        assert all(np.array_equal(a.prompt.ids, prompt) for a in group.answers), "a group answers one prompt"
        shared += share_beginning(own, len(prompt))
    return shared


def _sequence(answer: Completion, advantage: float, config: RlvrConfig) -> TrainSequence:
    start, count = len(answer.prompt.ids), len(answer.ids)
    masked = config.overlong == "mask" and answer.finish == "length"
    # Of a masked answer a stub is left, which carries its share of the divisor and costs two tokens.
    ids = np.concatenate((answer.prompt.ids, answer.ids)).astype(np.int32)[: 2 if masked else None]
    weight, extras = (
        np.zeros(len(ids), np.float32),
        {name: np.zeros(len(ids), np.float32) for name in extras_of(config)},
    )
    if not masked:
        weight[start:] = answer_weight(count, config.aggregation)
        extras["advantages"][start:] = advantage
        extras["behaviour_log_probs"][start:] = answer.log_probs
    weights = {ACTION: weight}
    if config.aggregation == "constant":
        weights[ANSWERS] = np.zeros(len(ids), np.float32)
        # At the end, which an answer shares with no other; where it stands is of no matter to a divisor.
        weights[ANSWERS][-1] = config.max_tokens
    if config.kl_coefficient:
        weights[REFERENCE] = weight
    return TrainSequence(ids, weights, extras)


def components_of(config: RlvrConfig) -> tuple[str, ...]:
    """Names of the token weights that every batch has."""
    more = [ANSWERS] * (config.aggregation == "constant") + [REFERENCE] * (config.kl_coefficient > 0)
    return (ACTION, *more)


def extras_of(config: RlvrConfig) -> tuple[str, ...]:
    """Names in `TrainBatch.extras` that every batch has before log-probs of other policies are added."""
    return ("behaviour_log_probs", "advantages")


def answer_batches(
    sequences: Sequence[TrainSequence],
    config: RlvrConfig,
    train: TrainConfig,
    parallel: Parallel,
    multiple: int,
    unit: int = UNIT,
) -> list[TrainBatch]:
    """Collective over the replicas: micro-batches of this replica's sequences, equally many on each.

    As many as windows of `train.seq_length` make; the windows are then as short as the sequences allow, of one length
    on a replica. `multiple`: that of padded sequences; `unit`: of a process's tokens of a window. Raises UserError for
    an answer longer than a window.
    """
    names, extras = components_of(config), extras_of(config)
    sizes, size = parallel.sizes, train.micro_batch_size
    group = size * (sizes.pipeline if sizes.virtual_pipeline else 1)
    unit *= multiple * (sizes.tensor if sizes.sequence else 1)
    windows = Windows(sequences, train.seq_length, multiple, unit, group)
    groups = max(1, -(-windows.fewest // group))
    # Gradients are reduced after the last micro-batch: replicas that count differently would wait for one another.
    groups = all_reduce_max(parallel.group("dp"), groups, "micro-batches of the update")
    length, filled = windows.fill(groups * group)
    filled += [[] for _ in range(groups * group - len(filled))]
    parts = [filled[i : i + size] for i in range(0, len(filled), size)]
    return [collate(part, length, 0, multiple, names, extras) for part in parts]


def with_log_probs(batches: Sequence[TrainBatch], name: str, values: Sequence[torch.Tensor]) -> list[TrainBatch]:
    """The batches with [tokens] log-probs of another policy beside their labels, under `name`."""
    return [replace(b, extras={**b.extras, name: v}) for b, v in zip(batches, values, strict=True)]
