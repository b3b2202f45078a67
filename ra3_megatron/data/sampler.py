"""The order of training windows, resumable and independent of how the work is spread over processes."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ra3_megatron.config.errors import UserError


@dataclass(frozen=True)
class SamplerState:
    """Position in the data: `consumed` windows since the start, of the data set named by `fingerprint`."""

    consumed: int
    seed: int
    fingerprint: str


@dataclass(frozen=True)
class RankBatch:
    """One rank's part of a global batch: windows per micro-batch, int64 `[micro_batches, micro_batch_size]`.

    `state` is the position after the whole global batch; a checkpoint made after its step stores this one.
    """

    windows: np.ndarray
    state: SamplerState


class WindowSampler:
    """Endless global batches of windows: epoch after epoch, each in its own seeded order.

    Global batch k holds windows k*B to (k+1)*B of that stream, on whatever ranks, in whatever micro-batches.
    """

    def __init__(self, num_windows: int, global_batch_size: int, seed: int, fingerprint: str):
        """`global_batch_size` in windows (sequences of the model). Raises UserError for an empty data set."""
        if num_windows < 1:
            raise UserError("the data set holds no windows; prepare a larger corpus")
        self.num_windows, self.global_batch_size = num_windows, global_batch_size
        self._seed, self._fingerprint = seed, fingerprint
        self._consumed = 0
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    @property
    def state(self) -> SamplerState:
        """Position after the last global batch that was taken."""
        return SamplerState(self._consumed, self._seed, self._fingerprint)

    def state_dict(self) -> dict[str, Any]:
        """`state` as plain data."""
        return asdict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position. Raises UserError when it belongs to another data set or seed."""
        saved = SamplerState(**state)
        if saved.fingerprint != self._fingerprint:
            raise UserError(
                f"the checkpoint saw data set {saved.fingerprint[:12]}; this one is {self._fingerprint[:12]}; "
                "use the data, tokenizer, sequence length and padding of the first run, or start a new one"
            )
        if saved.seed != self._seed:
            raise UserError(
                f"the checkpoint's data order has seed {saved.seed}; the run has {self._seed}; use the same seed"
            )
        self._consumed = saved.consumed

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self._consumed / self.num_windows

    def windows(self, start: int, count: int) -> np.ndarray:
        """Windows at positions `start` to `start + count` of the endless stream, int64 `[count]`."""
        found = []
        while count > 0:
            epoch, offset = divmod(start, self.num_windows)
            if epoch != self._epoch:
                self._order = np.random.default_rng([self._seed, epoch]).permutation(self.num_windows)
                self._epoch = epoch
            part = self._order[offset : offset + count]
            found.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(found)

    def batches_for(self, data_rank: int, data_size: int, micro_batch_size: int) -> Iterator[RankBatch]:
        """This rank's part of each coming global batch, without end.

        The sampler's own position moves when a batch is taken. Raises UserError when the batch cannot be divided.
        """
        share = data_size * micro_batch_size
        if self.global_batch_size % share:
            raise UserError(
                f"global_batch_size {self.global_batch_size} is no multiple of micro_batch_size {micro_batch_size} x "
                f"{data_size} data ranks; use a multiple of {share}"
            )
        return self._iterate(data_rank, data_size, micro_batch_size)

    def _iterate(self, data_rank: int, data_size: int, micro_batch_size: int) -> Iterator[RankBatch]:
        own = self.global_batch_size // data_size
        while True:
            windows = self.windows(self._consumed + data_rank * own, own)
            self._consumed += self.global_batch_size
            yield RankBatch(windows.reshape(-1, micro_batch_size), self.state)
