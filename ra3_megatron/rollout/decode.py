"""Decode passes: every row goes on by one token and asks the same question about the next.

They are most passes of a completion, and on a GPU their time is that of starting kernels. So their sizes are few, their
inputs lie in fixed memory, and nothing in them depends on numbers that the host would have to read: a CUDA graph can
hold one whole, the draw included. Without graphs the same code runs on sizes that are exact.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ra3_megatron.algo.logprobs import VocabShard
from ra3_megatron.rollout.forward import Forward, Outcome
from ra3_megatron.rollout.graphs import GraphStore
from ra3_megatron.rollout.layout import ALIGNED_KEYS, Group, Layout, causal_mask
from ra3_megatron.rollout.passes import ANSWERS, settled
from ra3_megatron.rollout.sampling import CANDIDATES, LocalSet, Part, look

GAPS = 1.25
"""A decode pass takes all slots up to its last row's; at most so many times as many as it has rows."""

LEAST_KEYS = 64
"""Sizes of the cache's part that a captured pass attends to are multiples of this."""


@dataclass(frozen=True)
class DecodeBatch:
    """Rows with one new token each, and the one question they ask."""

    slots: np.ndarray
    """int64 [rows], no two the same."""
    tokens: np.ndarray
    """int64 [rows]: the new token."""
    positions: np.ndarray
    """int64 [rows]: its position in the row."""
    uniforms: np.ndarray
    """float64 [rows]: for the draw of the next token; NaN = none."""
    number: int
    """Of the set of ids that is asked about."""
    top_p: float
    """See `Query`."""

    @property
    def span(self) -> int:
        """Slots that the pass takes."""
        return int(self.slots.max()) + 1


def size_up(count: int, least: int = 1) -> int:
    """The next of about four sizes per doubling, multiples of `least`: at most a quarter more than `count`."""
    step = max(least, 1 << max(0, count.bit_length() - 3))
    return -(-count // step) * step


@dataclass(frozen=True)
class _Inputs:
    """Fixed memory of the passes of one number of rows: ids, positions, positions to write to, uniforms' bits."""

    host: np.ndarray
    """int64 [4, tokens]"""
    staged: Tensor
    """The same memory as a tensor, pinned for a GPU."""
    device: Tensor
    """Its copy on the device; itself on a CPU."""
    slots: Tensor
    """int64 [tokens]: token i is that of slot i; those of no row are written out of the way in slot 0."""


class DecodeRunner:
    """Decode passes of one engine; `sets` are its token sets. With `graphs`, sizes are rounded up and captured."""

    def __init__(
        self, forward: Forward, sets: Sequence[LocalSet], vocab: VocabShard, graphs: GraphStore | None, rounded: bool
    ) -> None:
        self._forward, self._sets, self._vocab = forward, sets, vocab
        self.graphs, self._rounded = graphs, rounded
        self._inputs: dict[int, _Inputs] = {}

    def run(self, batch: DecodeBatch, temperature: float) -> np.ndarray:
        """All processes: log-mass, id and log-probability of each row's question, float64 [3, rows]."""
        rows, keys = self._sizes(batch)
        inputs = self._filled(batch, rows)
        answer = partial(self._answer, inputs, rows, self._sets[batch.number], batch.top_p, temperature)
        compute = partial(self._compute, inputs, rows, keys, answer)
        if self.graphs is None:
            outcome = compute()
        else:
            outcome = self.graphs.run((rows, keys, batch.number, batch.top_p, temperature), compute)
        return settled(self._forward, outcome, answer, rows).reshape(ANSWERS, rows)[:3, batch.slots]

    def _sizes(self, batch: DecodeBatch) -> tuple[int, int]:
        """Slots and keys of the pass."""
        rows, keys = batch.span, int(batch.positions.max()) + 1
        if self._rounded:
            rows, keys = size_up(rows), size_up(keys, LEAST_KEYS)
        elif self._forward.parallel.on_gpu:
            keys = -(-keys // ALIGNED_KEYS) * ALIGNED_KEYS
        return min(rows, self._forward.slots), min(keys, self._forward.length)

    def _filled(self, batch: DecodeBatch, rows: int) -> _Inputs:
        if rows not in self._inputs:
            self._inputs[rows] = self._memory(rows)
        inputs = self._inputs[rows]
        host = inputs.host
        # Slots that take no part see one key of whoever is there, and ask nothing.
        host[:2] = 0
        host[2] = self._forward.length - 1
        uniforms = host[3].view(np.float64)
        uniforms.fill(np.nan)
        host[0, batch.slots] = batch.tokens
        host[1, batch.slots] = host[2, batch.slots] = batch.positions
        uniforms[batch.slots] = batch.uniforms
        if inputs.device is not inputs.staged:
            inputs.device.copy_(inputs.staged, non_blocking=True)
        return inputs

    def _memory(self, rows: int) -> _Inputs:
        device, tokens = self._forward.parallel.device, rows + -rows % self._forward.multiple
        staged = torch.zeros(4, tokens, dtype=torch.int64, pin_memory=device.type == "cuda")
        slots = torch.arange(tokens)
        slots[rows:] = 0
        there = torch.zeros_like(staged, device=device) if device.type == "cuda" else staged
        return _Inputs(staged.numpy(), staged, there, slots.to(device))

    def _compute(self, inputs: _Inputs, rows: int, keys: int, answer: Callable[..., Tensor]) -> Outcome:
        """The pass, from what lies in `inputs`."""
        forward, (ids, positions, write, _) = self._forward, inputs.device
        mask = causal_mask(positions[:rows, None], keys, forward.config.params_dtype)
        group = Group(slice(0, rows), None, None, None, keys, mask)
        layout = Layout(rows, len(ids) - rows, inputs.slots, write, positions, [group])
        return forward.run(ids.unsqueeze(0), layout, answer, ANSWERS * rows)

    def _answer(
        self,
        inputs: _Inputs,
        rows: int,
        local: LocalSet,
        top_p: float,
        temperature: float,
        hidden: Tensor,
        output: Callable[[Tensor], Tensor],
        candidates: int = CANDIDATES,
    ) -> Tensor:
        uniforms = inputs.device[3, :rows].view(torch.float64)
        logits = output(hidden[:rows].unsqueeze(1))[:, 0]
        return look(logits, [Part(None, local, top_p)], uniforms, self._vocab, temperature, candidates).view(-1)
