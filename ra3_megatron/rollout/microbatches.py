"""An experience as micro-batches for the training engine, equally many on every replica."""

from collections.abc import Callable, Sequence

import numpy as np

from ra3_megatron.data.batch import TrainBatch, collate
from ra3_megatron.data.latent import ThinkTokens
from ra3_megatron.data.packing import TrainSequence, pack
from ra3_megatron.rollout.experience import Experience
from ra3_megatron.rollout.update import update_sequences
from ra3_megatron.training.actions import ACTION, THINK_SET, THOUGHT

EXTRAS = (THINK_SET, THOUGHT, "behaviour_log_probs", "advantages")
"""What every micro-batch carries beside the weights."""


def update_batches(
    experience: Experience,
    think_tokens: ThinkTokens,
    window: tuple[int, int],
    micro_batch_size: int,
    group: int,
    agree: Callable[[int], int],
) -> tuple[list[TrainBatch], int]:
    """Pack the actions of an experience; returns (micro-batches, tokens in them, padding left out).

    `window` = (tokens of a window, multiple that sequences are padded to). The number of micro-batches is what `agree`
    makes of this replica's (the largest over the replicas), rounded up to a multiple of `group`: empty windows fill up.
    """
    seq_length, multiple = window
    drawn = [s.drawn or s.rollout for s in experience.scored]
    advantages = [experience.advantages_of(i) for i in range(len(drawn))]
    sequences = [s for s in update_sequences(drawn, advantages, think_tokens) if s.weights[ACTION].any()]
    lengths = np.array([len(s.ids) for s in sequences], dtype=np.int64)
    packing = pack(lengths, seq_length, multiple)
    windows: list[Sequence[TrainSequence]] = [[sequences[i] for i in packing.window(w)] for w in range(len(packing))]
    count = max(1, agree(-(-len(windows) // micro_batch_size)))
    count = -(-count // group) * group
    windows += [[_nothing()] for _ in range(count * micro_batch_size - len(windows))]
    batches = [
        collate(windows[i : i + micro_batch_size], seq_length, 0, multiple, (ACTION,))
        for i in range(0, len(windows), micro_batch_size)
    ]
    return batches, int(lengths.sum())


def _nothing() -> TrainSequence:
    """A token that predicts nothing, with all that a batch is asked for."""
    zero = np.zeros(1, np.float32)
    return TrainSequence(np.zeros(1, np.int32), {ACTION: zero}, dict.fromkeys(EXTRAS, zero))
