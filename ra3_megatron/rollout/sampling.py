"""Masses of token sets and draws from them, with the vocabulary split over a process group.

A draw is the inverse of the cumulative distribution in the order of ids, for a uniform that comes from outside: the
same number gives the same id whatever the split. Processes exchange a few numbers per token, never logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ra3_megatron.algo.logprobs import VocabShard


@dataclass(frozen=True)
class LocalSet:
    """This process's part of a set of ids.

    `columns` [n] are indices into this process's columns, in rising order; a set of most columns is a `mask`
    [columns of this process] instead (0 or 1, fp32), so that nothing large is copied.
    """

    columns: Tensor | None
    mask: Tensor | None

    @classmethod
    def of(cls, ids: np.ndarray, shard: VocabShard, width: int, device: torch.device) -> "LocalSet":
        """The part of `ids` (unique, rising) that lies in this process's `width` columns."""
        local = ids[(ids >= shard.start) & (ids < shard.start + shard.valid_columns(width))] - shard.start
        columns = torch.from_numpy(local.astype(np.int64)).to(device)
        if 2 * len(local) <= width:
            return cls(columns, None)
        mask = torch.zeros(width, device=device)
        mask[columns] = 1.0
        return cls(None, mask)

    def select(self, weights: Tensor) -> Tensor:
        """Weights of the set's ids, float64 `[rows, n]` (zeros for others when it is a mask)."""
        return (weights[:, self.columns] if self.mask is None else weights * self.mask).double()

    def column(self, index: Tensor) -> Tensor:
        """Columns of this process at positions `index` of what `select` returns."""
        return index if self.columns is None else self.columns[index]


@dataclass(frozen=True)
class Drawn:
    """Answers to queries, the same on every process of the group."""

    log_masses: Tensor
    """float64 [n], nats."""
    ids: Tensor
    """int64 [n]; -1 where nothing was or could be drawn."""
    log_probs: Tensor
    """float64 [n], nats, over the whole vocabulary; NaN where nothing was drawn."""


def _shifted(logits: Tensor, shard: VocabShard, temperature: float) -> Tensor:
    """fp32 logits over the temperature minus their maximum over the vocabulary; columns of padding are -inf."""
    x = logits.float() / temperature
    x[:, shard.valid_columns(x.size(1)) :] = -torch.inf
    maximum = x.amax(1) if x.size(1) else x.new_full((len(x),), -torch.inf)
    if shard.group is not None:
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=shard.group)
    return x - maximum.unsqueeze(1)


def _last_positive(cumulative: Tensor) -> Tensor:
    """First index that reaches the total: the last with a weight. `[rows, 1]`"""
    return torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())


def _pick(cumulative: Tensor, target: Tensor) -> Tensor:
    """First index whose cumulative weight exceeds `target` [rows]; rounding cannot leave the positive weights."""
    found = torch.searchsorted(cumulative, target.unsqueeze(1), right=True)
    return torch.minimum(found, _last_positive(cumulative)).squeeze(1)


def answer_queries(
    logits: Tensor,
    sets: Sequence[LocalSet],
    numbers: Tensor,
    uniforms: Tensor,
    shard: VocabShard,
    temperature: float = 1.0,
) -> Drawn:
    """Mass of `sets[numbers[i]]` under row i and a draw from it by `uniforms[i]` (NaN = none).

    `logits` [n, columns of this process], `numbers` int64 [n] on the CPU, `uniforms` float64 [n] on the device.
    """
    x = _shifted(logits, shard, temperature)
    weights = x.exp()
    device = x.device
    total = weights.sum(1, dtype=torch.float64)
    mass = torch.zeros_like(total)
    parts: list[tuple[Tensor, Tensor, LocalSet]] = []
    for number in numbers.unique().tolist():
        rows = (numbers == number).nonzero().squeeze(1).to(device)
        cumulative = sets[number].select(weights[rows]).cumsum(1)
        if cumulative.size(1):
            mass[rows] = cumulative[:, -1]
        parts.append((rows, cumulative, sets[number]))
    rank, shares = 0, mass.unsqueeze(0)
    if shard.group is not None:
        rank = shard.group.rank()
        both = torch.stack((mass, total))
        gathered = [torch.empty_like(both) for _ in range(shard.group.size())]
        dist.all_gather(gathered, both, group=shard.group)
        stacked = torch.stack(gathered)
        shares, total = stacked[:, 0], stacked[:, 1].sum(0)
    bounds = shares.cumsum(0)
    target = uniforms.nan_to_num(0.0) * bounds[-1]
    owner = _pick(bounds.T.contiguous(), target)
    chosen = torch.zeros(2, len(x), dtype=torch.float64, device=device)
    for rows, cumulative, part in parts:
        rows, cumulative = _mine(rows, cumulative, owner == rank)
        if not rows.numel() or not cumulative.size(1):
            continue
        before = bounds[rank, rows] - shares[rank, rows]
        column = part.column(_pick(cumulative, target[rows] - before))
        chosen[0, rows] = (column + shard.start).double()
        chosen[1, rows] = x[rows, column].double()
    if shard.group is not None:
        dist.all_reduce(chosen, group=shard.group)
    nothing = uniforms.isnan() | (bounds[-1] == 0)
    return Drawn(
        (bounds[-1] / total).log(),
        chosen[0].long().masked_fill(nothing, -1),
        (chosen[1] - total.log()).masked_fill(nothing, torch.nan),
    )


def _mine(rows: Tensor, cumulative: Tensor, owned: Tensor) -> tuple[Tensor, Tensor]:
    """The rows whose draw falls into this process's columns."""
    here = owned[rows]
    return rows[here], cumulative[here]
