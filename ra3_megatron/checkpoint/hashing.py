"""A checksum of a model's parameters that does not depend on how they are split over ranks.

For every global tensor K with elements x[r, c] (c = last axis, r = all other axes flattened, both counted in the
global tensor) and integer bit patterns b(x):

    S_K = Σ_r Σ_c  b(x[r, c]) · A_K[r] · B_K[c]   mod 2^64

A_K and B_K are odd 64-bit numbers drawn by splitmix64 from the tensor's name. A shard needs only its own elements and
its global offset, and shards add up, so every TP, PP, DP and CP layout gives the same sums. The result is the SHA-256
of all (name, dtype, shape, S_K).

What it catches: a change of any single element, always (an odd factor cannot turn a non-zero difference below 2^64
into zero); swapped rows, columns, layers or tensors, shifted offsets and other accidents in many elements, except with
a probability of about 2^-32 or less (differences in the highest bits leave the fewest bits of the sum). It is a check
against accidents, not against an adversary.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ra3_megatron.model.factory import unwrap
from ra3_megatron.model.precision import is_quantised
from ra3_megatron.parallel.collectives import gather_objects
from ra3_megatron.parallel.groups import Parallel

_MASK = (1 << 64) - 1
_CHUNK = 1 << 18
"""Elements handled at a time: bounds the temporary memory at a few times 2 MiB, which stays in the cache."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _odd_weights(index: torch.Tensor, seed: int) -> torch.Tensor:
    """Splitmix64 of `seed + index`, made odd. `index` [n] int64 → [n] int64, all arithmetic mod 2^64."""

    def shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
        # int64 shifts copy the sign bit; the mask turns that into the unsigned shift the generator is defined with.
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    z = index * _signed(0x9E3779B97F4A7C15) + _signed(seed)
    z = (z ^ shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return (z ^ shift_right(z, 31)) | 1


def _seeds(key: str) -> tuple[int, int]:
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def _global_rows(shape: Sequence[int], offset: Sequence[int], global_shape: Sequence[int], device: Any) -> torch.Tensor:
    """Flattened index in the global tensor of every local row. Shapes are those of the leading axes."""
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    for size, start, total in zip(shape, offset, global_shape, strict=True):
        axis = torch.arange(start, start + size, dtype=torch.int64, device=device)
        rows = (rows[:, None] * total + axis).flatten()
    return rows


def shard_sum(key: str, shard: torch.Tensor, offset: Sequence[int], global_shape: Sequence[int]) -> int:
    """The contribution of one shard to the sum of the global tensor `key`, in [0, 2^64).

    `shard` has as many axes as `global_shape` and lies at `offset` in it.
    """
    if shard.numel() == 0:
        return 0
    shard = shard.detach()
    if shard.dim() == 0:
        shard, offset, global_shape = shard[None], (0,), (1,)
    row_seed, column_seed = _seeds(key)
    device = shard.device
    columns = torch.arange(offset[-1], offset[-1] + shard.shape[-1], dtype=torch.int64, device=device)
    column_weights = _odd_weights(columns, column_seed)
    rows = _global_rows(shard.shape[:-1], offset[:-1], global_shape[:-1], device)
    row_weights = _odd_weights(rows, row_seed)
    bits = shard.contiguous().view(_BITS[shard.element_size()]).reshape(len(rows), -1)
    step = max(1, _CHUNK // bits.shape[1])
    total = torch.zeros((), dtype=torch.int64, device=device)
    for start in range(0, len(rows), step):
        wide = bits[start : start + step].to(torch.int64)
        # The same sums either way; a CPU does them in one pass, and CUDA has no integer matrix product.
        part = wide @ column_weights if device.type == "cpu" else (wide * column_weights).sum(1)
        total += (part * row_weights[start : start + step]).sum()
    return int(total.item()) & _MASK


@dataclass
class ParameterSums:
    """Sums of the tensors seen so far; shards can be added in any order and on any rank, then merged."""

    tensors: dict[str, tuple[str, tuple[int, ...], int]] = field(default_factory=dict)
    """Name → (dtype, global shape, sum mod 2^64)."""

    def add(
        self,
        key: str,
        shard: torch.Tensor,
        offset: Sequence[int],
        global_shape: Sequence[int],
        row_limit: int | None = None,
        dtype: str | None = None,
    ) -> None:
        """Add one shard; rows of the first axis from `row_limit` on (vocabulary padding) are left out.

        `dtype` names what the numbers are, where that is not the type they come in.
        """
        if row_limit is not None:
            shard = shard[: max(0, min(shard.shape[0], row_limit - offset[0]))]
            global_shape = (min(row_limit, global_shape[0]), *global_shape[1:])
        dtype = dtype or str(shard.dtype).removeprefix("torch.")
        self._put(key, dtype, tuple(global_shape), shard_sum(key, shard, offset, global_shape))

    def merge(self, other: "ParameterSums") -> None:
        """Add the sums of another rank."""
        for key, (dtype, shape, value) in other.tensors.items():
            self._put(key, dtype, shape, value)

    def _put(self, key: str, dtype: str, shape: tuple[int, ...], value: int) -> None:
        known = self.tensors.get(key, (dtype, shape, 0))
        assert known[:2] == (dtype, shape), f"{key}: {known[:2]} on one rank, {(dtype, shape)} on another"
        self.tensors[key] = (dtype, shape, (known[2] + value) & _MASK)

    @property
    def dtypes(self) -> list[str]:
        """The element types met, sorted."""
        return sorted({dtype for dtype, _, _ in self.tensors.values()})

    def hexdigest(self) -> str:
        """SHA-256 over names, dtypes, shapes and sums, 64 hexadecimal digits."""
        lines = (f"{k} {d} {list(s)} {v:016x}\n" for k, (d, s, v) in sorted(self.tensors.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def model_shards(model_chunks: Sequence[torch.nn.Module], values: bool = True) -> Iterator[Any]:
    """Yield Megatron's `ShardedTensor` of every tensor this rank holds, factories (gated MLP) taken apart.

    Weights kept in FP8 cannot be cut up as they are; they come as the numbers they stand for, on the host, or without
    `values` as shapes alone.
    """
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    for chunk in model_chunks:
        tensors = unwrap(chunk).sharded_state_dict()
        for entry in tensors.values():
            data = getattr(entry, "data", None)
            if isinstance(data, torch.Tensor) and is_quantised(data):
                shape_only = torch.empty(data.shape, dtype=data.dtype, device="meta")
                entry.data = data.detach().dequantize().cpu() if values else shape_only
        apply_factories(tensors)
        yield from (x for x in nested_values(tensors) if isinstance(x, ShardedTensor))


def hashed_keys(shards: Iterator[Any], vocab_size: int | None) -> dict[str, int | None]:
    """Name → rows that count, for every tensor that enters the hash; None means all rows.

    Tensors whose padded size Megatron lets vary between layouts count only up to `vocab_size`.
    """
    return {s.key: vocab_size if s.allow_shape_mismatch else None for s in shards}


def merge_sums(parts: Iterable[ParameterSums]) -> ParameterSums:
    """The sums of all ranks together."""
    merged = ParameterSums()
    for part in parts:
        merged.merge(part)
    return merged


def parameter_sums(
    model_chunks: Sequence[torch.nn.Module], parallel: Parallel, vocab_size: int | None = None
) -> ParameterSums:
    """Collective over all ranks: sums of the parameters as they stand.

    With `vocab_size`, rows that only pad the vocabulary are left out; give it wherever layouts are compared whose
    padding differs.
    """
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    # Weights kept in FP8 were rounded when loaded: their sums are of other numbers than those that were saved.
    name = "float8" if any(is_quantised(p) for chunk in model_chunks for p in chunk.parameters()) else None
    local = ParameterSums()
    for shard in model_shards(model_chunks):
        if is_main_replica(shard.replica_id):
            data = shard.data
            for _ in range(shard.prepend_axis_num):
                data = data[None]
            limit = vocab_size if shard.allow_shape_mismatch else None
            local.add(shard.key, data, shard.global_offset, shard.global_shape, limit, name)
    return merge_sums(gather_objects(parallel.world, local, "hash of the parameters"))


def hash_parameters(model_chunks: Sequence[torch.nn.Module], parallel: Parallel, vocab_size: int | None = None) -> str:
    """Collective over all ranks: SHA-256 of the parameters, the same for every layout; see the module's docstring."""
    return parameter_sums(model_chunks, parallel, vocab_size).hexdigest()
