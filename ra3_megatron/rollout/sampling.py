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

BLOCK = 256
"""Columns that are summed before anything is cumulated: a cumulative sum costs a hundred times a sum."""

CANDIDATES = 64
"""Most probable ids a process looks at first for a draw from a part of the distribution."""

MORE = 4
"""So many times more of them are looked at while they do not hold that part."""


@dataclass(frozen=True)
class LocalSet:
    """This process's part of a set of ids.

    `columns` [n] are indices into this process's columns, in rising order. Sets of most columns are not gathered: the
    first `leading` columns, or a `mask` [real columns of this process] (0 or 1, fp32). One of the three is there.
    """

    columns: Tensor | None = None
    mask: Tensor | None = None
    leading: int | None = None

    @classmethod
    def of(cls, ids: np.ndarray, shard: VocabShard, width: int, device: torch.device) -> "LocalSet":
        """The part of `ids` (unique, rising) that lies in this process's `width` columns."""
        local = ids[(ids >= shard.start) & (ids < shard.start + shard.valid_columns(width))] - shard.start
        if len(local) and local[-1] == len(local) - 1:
            return cls(leading=len(local))
        columns = torch.from_numpy(local.astype(np.int64)).to(device)
        if 2 * len(local) <= width:
            return cls(columns)
        mask = torch.zeros(shard.valid_columns(width), device=device)
        mask[columns] = 1.0
        return cls(mask=mask)

    def select(self, weights: Tensor) -> Tensor:
        """Weights of the set's ids, `[rows, n]` (zeros for others when it is a mask)."""
        if self.leading is not None:
            return weights[:, : self.leading]
        return weights[:, self.columns] if self.mask is None else weights * self.mask

    def scores(self, x: Tensor) -> Tensor:
        """As `select`, of logarithms of weights: -inf for others when it is a mask."""
        return self.select(x) if self.mask is None else x.masked_fill(self.mask == 0, -torch.inf)

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
    """fp32 logits over the temperature minus their maximum over the vocabulary; columns of padding are left out."""
    x = logits[:, : shard.valid_columns(logits.size(1))].float()
    x = x / temperature if temperature != 1.0 else x
    maximum = x.amax(1) if x.size(1) else x.new_full((len(x),), -torch.inf)
    if shard.group is not None:
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=shard.group)
    return x - maximum.unsqueeze(1)


def _last_positive(cumulative: Tensor) -> Tensor:
    """First index that reaches the total: the last with a weight. `[rows, 1]`"""
    return torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())


def _pick(cumulative: Tensor, target: Tensor) -> Tensor:
    """First index whose cumulative weight exceeds `target` [rows]; rounding cannot leave the positive weights.

    Some index even where weights are NaN: reading past the end would end a GPU's process without a word of why.
    """
    found = torch.searchsorted(cumulative, target.unsqueeze(1), right=True)
    return torch.minimum(found, _last_positive(cumulative)).squeeze(1).clamp_(max=cumulative.size(1) - 1)


def _blocks(weights: Tensor) -> Tensor:
    """Sums of `BLOCK` columns of `weights` [rows, n] each, the last perhaps of fewer, float64 `[rows, blocks]`."""
    whole = weights.size(1) // BLOCK
    main = weights[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).sum(2)
    rest = weights[:, whole * BLOCK :]
    return (torch.cat((main, rest.sum(1, keepdim=True)), 1) if rest.size(1) else main).double()


class _Cumulated:
    """Weights [rows, n] of a set in the order of ids, cumulated over blocks."""

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights
        self._bounds = _blocks(weights).cumsum(1)

    @property
    def empty(self) -> bool:
        """Whether the set has no id here."""
        return not self._weights.size(1)

    @property
    def mass(self) -> Tensor:
        """float64 [rows]"""
        bounds = self._bounds
        return bounds[:, -1] if bounds.size(1) else bounds.new_zeros(len(bounds))

    def pick(self, target: Tensor) -> Tensor:
        """Place in the set of the first weight at which the sum exceeds `target` [rows]. int64 [rows]"""
        bounds, width = self._bounds, self._weights.size(1)
        block = _pick(bounds, target).unsqueeze(1)
        before = torch.where(block > 0, bounds.gather(1, (block - 1).clamp(min=0)), 0.0).squeeze(1)
        columns = block * BLOCK + torch.arange(min(BLOCK, width), device=bounds.device)
        weights = self._weights.gather(1, columns.clamp(max=width - 1)).masked_fill(columns >= width, 0.0)
        return block.squeeze(1) * BLOCK + _pick(weights.double().cumsum(1), target - before)


@dataclass(frozen=True)
class Part:
    """Rows that ask about the same set in the same way."""

    rows: Tensor | None
    """int64 [rows of the part], on the device; none = all there are."""
    local: LocalSet
    """This process's part of the set."""
    top_p: float
    """See `Query`."""

    def take(self, x: Tensor) -> Tensor:
        """The part's rows of `x` [n, ...], not copied when they are all."""
        return x if self.rows is None else x[self.rows]


def kinds_of(numbers: Sequence[int], top_p: Sequence[float]) -> list[tuple[np.ndarray, int, float]]:
    """(rows, number of the set, `top_p`) of all that ask about the same set in the same way."""
    kinds: dict[tuple[int, float], list[int]] = {}
    for row, kind in enumerate(zip(numbers, top_p, strict=True)):
        kinds.setdefault(kind, []).append(row)
    return [(np.array(rows), number, share) for (number, share), rows in kinds.items()]


def _spread(parts: Sequence[Part], values: Sequence[Tensor], count: int) -> Tensor:
    """Numbers of the parts' rows, [..., rows of the part] each, in the order of all rows, `[..., count]`."""
    if parts and parts[0].rows is None:
        return values[0]
    out = values[0].new_zeros(*values[0].shape[:-1], count)
    for part, found in zip(parts, values, strict=True):
        out[..., part.rows] = found
    return out


def look(
    logits: Tensor,
    parts: Sequence[Part],
    uniforms: Tensor,
    shard: VocabShard,
    temperature: float = 1.0,
    candidates: int = CANDIDATES,
) -> Tensor:
    """Masses of the parts' sets and draws from them by `uniforms` [n] (float64, NaN = none), float64 `[4, n]`.

    log-masses; ids, -1 where nothing was or could be drawn; their log-probabilities, NaN there; and 1, or 0 where the
    `candidates` most probable ids of each process were too few to draw from, so that more must be looked at. `parts`
    are of at least one row and cover all. Nothing is read on the host: a CUDA graph may hold all of it.
    """
    x = _shifted(logits, shard, temperature)
    weights = x.exp()
    cumulated = [_Cumulated(p.local.select(p.take(weights))) for p in parts]
    sums = torch.stack((_spread(parts, [c.mass for c in cumulated], len(x)), _blocks(weights).sum(1)))
    shares = _gathered(sums, shard)
    total, bounds = shares[:, 1].sum(0), shares[:, 0].cumsum(0)
    mass = bounds[-1]
    found = []
    for part, cumulative in zip(parts, cumulated, strict=True):
        own = part.take(x)
        if part.top_p < 1:
            column, mine, settled = _from_top(part, own, part.take(mass), part.take(uniforms), shard, candidates)
        else:
            column, mine = _from_all(part, cumulative, bounds, uniforms, shard)
            settled = torch.ones_like(mine)
        if own.size(1):
            column = column.clamp(0, own.size(1) - 1)
            values = own.gather(1, column.unsqueeze(1)).squeeze(1)
        else:
            values = own.new_zeros(len(own))
        drawn = torch.stack(((column + shard.start).double(), values.double())).masked_fill(~mine, 0.0)
        found.append(torch.cat((drawn, settled.unsqueeze(0).double())))
    drawn = _spread(parts, found, len(x))
    if shard.group is not None:
        # All processes find the same about the candidates.
        own_draws = drawn[:2].contiguous()
        dist.all_reduce(own_draws, group=shard.group)
        drawn = torch.cat((own_draws, drawn[2:]))
    nothing = uniforms.isnan() | (mass == 0)
    return torch.stack(
        (
            (mass / total).log(),
            drawn[0].masked_fill(nothing, -1),
            (drawn[1] - total.log()).masked_fill(nothing, torch.nan),
            drawn[2].masked_fill(nothing, 1.0),
        )
    )


def answer_queries(
    logits: Tensor,
    sets: Sequence[LocalSet],
    numbers: Tensor,
    uniforms: Tensor,
    shard: VocabShard,
    temperature: float = 1.0,
    top_p: Tensor | None = None,
) -> Drawn:
    """Mass of `sets[numbers[i]]` under row i and a draw from it by `uniforms[i]` (NaN = none).

    `logits` [n, columns of this process], `numbers` int64 [n] on the CPU, `uniforms` float64 [n] on the device, `top_p`
    float64 [n] on the CPU (none = 1, see `Query`).
    """
    shares = (torch.ones(len(logits)) if top_p is None else top_p).tolist()
    parts = [
        Part(torch.from_numpy(rows).to(logits.device), sets[number], share)
        for rows, number, share in kinds_of(numbers.tolist(), shares)
    ]
    count = CANDIDATES
    while True:
        values = look(logits, parts, uniforms, shard, temperature, count)
        if bool(values[3].all()):
            return Drawn(values[0], values[1].long(), values[2])
        count *= MORE


def _gathered(x: Tensor, shard: VocabShard) -> Tensor:
    """`x` of every process of the group, in order: `[processes, ...]`."""
    if shard.group is None:
        return x.unsqueeze(0)
    parts = [torch.empty_like(x) for _ in range(shard.group.size())]
    dist.all_gather(parts, x.contiguous(), group=shard.group)
    return torch.stack(parts)


def _from_all(
    part: Part, cumulative: _Cumulated, bounds: Tensor, uniforms: Tensor, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """Draws from a whole set. `bounds` float64 [processes, n]: mass of the set up to the end of each process.

    Returns columns, some number for draws of other processes, and which are of this one, bool; [rows of the part].
    """
    own = bounds if part.rows is None else bounds[:, part.rows]
    target = part.take(uniforms).nan_to_num(0.0) * own[-1]
    mine = own[-1] > 0
    if shard.group is not None:
        rank = shard.group.rank()
        mine &= _pick(own.T.contiguous(), target) == rank
        target = target - own[rank - 1] if rank else target
    if cumulative.empty:
        return torch.zeros_like(target, dtype=torch.int64), torch.zeros_like(mine)
    return part.local.column(cumulative.pick(target)), mine


def _from_top(
    part: Part, x: Tensor, mass: Tensor, uniforms: Tensor, shard: VocabShard, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws from the most probable ids of a set, as `_from_all`; every process finds them among all candidates.

    Only the most probable ids of each process are exchanged: what it leaves out is no more probable than the least of
    them, so the smallest set is known as soon as the ids above that hold enough. The third tensor says where they do,
    bool. `x` [rows of the part, columns]; `mass`, `uniforms` of the part.
    """
    found = _candidates(part.local, x, 1 if part.top_p == 0 else count, shard)
    if not found.values.size(1):
        return torch.zeros_like(mass, dtype=torch.int64), torch.zeros_like(mass) > 0, mass == 0
    weights = found.values.exp().double()
    cumulative = weights.cumsum(1)
    # The id that reaches the wanted mass is the last one.
    wanted = (part.top_p * mass).unsqueeze(1)
    last = torch.minimum((cumulative < wanted).sum(1, keepdim=True), _last_positive(cumulative))
    last = last.clamp_(max=weights.size(1) - 1)
    settled = (found.values.gather(1, last) > found.left_out).squeeze(1)
    kept = torch.arange(weights.size(1), device=x.device) <= last
    ids, order = found.ids.masked_fill(~kept, torch.iinfo(torch.int64).max).sort(1)
    inside = weights.masked_fill(~kept, 0.0).gather(1, order).cumsum(1)
    target = uniforms.nan_to_num(0.0) * inside[:, -1]
    column = ids.gather(1, _pick(inside, target).unsqueeze(1)).squeeze(1) - shard.start
    mine = (column >= 0) & (column < x.size(1)) & (mass > 0)
    return column, mine, settled if part.top_p else torch.ones_like(settled)


@dataclass(frozen=True)
class _Candidates:
    """The most probable ids of a set, the most probable first and the lower ids first among equals."""

    values: Tensor
    """fp32 [rows, candidates]: logarithms of their weights, falling."""
    ids: Tensor
    """int64 [rows, candidates], of the vocabulary; meaningless where the value is -inf."""
    left_out: Tensor
    """fp32 [rows, 1]: nothing that is no candidate is above this; -inf when all are."""


def _candidates(local: LocalSet, x: Tensor, count: int, shard: VocabShard) -> _Candidates:
    """At least the `count` most probable ids of a set in the whole vocabulary."""
    own = local.scores(x)
    width = own.size(1)
    if count == 1 and width:
        # Of equals the first, which `topk` does not promise.
        values, index = own.max(1, keepdim=True)
    else:
        values, index = own.topk(min(count, width))
    left_out = values[:, -1:] if width > count else x.new_full((len(x), 1), -torch.inf)
    missing = count - values.size(1)
    ids = local.column(index) + shard.start
    if shard.group is not None:
        padding = (0, max(0, missing))
        values = torch.nn.functional.pad(values, padding, value=-torch.inf)
        ids = torch.nn.functional.pad(ids, padding)
        values, left_out = (_gathered(t, shard) for t in (values, left_out))
        values, left_out = values.transpose(0, 1).flatten(1), left_out.amax(0)
        ids = _gathered(ids, shard).transpose(0, 1).flatten(1)
    ids, order = ids.sort(1)
    values, falling = values.gather(1, order).sort(stable=True, dim=1, descending=True)
    return _Candidates(values, ids.gather(1, falling), left_out)
