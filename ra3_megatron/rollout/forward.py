"""One forward pass of the whole model over new tokens of rows: pipeline stages, caches, and who tells whom the answers.

Every process of a model replica calls it with the same arguments.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ra3_megatron.model.attention import packed_attention, packed_attention_here
from ra3_megatron.model.factory import unwrap
from ra3_megatron.model.fp8_passes import histories_kept, token_multiple
from ra3_megatron.model.precision import renew_quantised_weights
from ra3_megatron.parallel.collectives import explain_timeouts
from ra3_megatron.parallel.groups import Parallel
from ra3_megatron.rollout.cache import ChunkCache
from ra3_megatron.rollout.layout import Layout
from ra3_megatron.training.schedule import whole_hidden

Answerer = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
"""`(hidden states [tokens, hidden], output layer [rows, 1, hidden] -> [rows, 1, columns])` to float64 numbers."""


@dataclass(frozen=True)
class Outcome:
    """What came of a pass."""

    values: Tensor
    """float64: the answers, the same on every process."""
    hidden: Tensor | None
    """Of the last stage, [tokens, hidden]; none on the others. Valid until the next pass."""
    output: Callable[[Tensor], Tensor] | None
    """The output layer, where the hidden states are."""


class Forward:
    """Forward passes of `chunks` with `slots` x `length` cached keys and values."""

    def __init__(self, chunks: Sequence[torch.nn.Module], parallel: Parallel, slots: int, length: int) -> None:
        self.chunks, self.parallel = list(chunks), parallel
        self.config: Any = unwrap(chunks[0]).config
        self.slots, self.length = slots, length
        width, dtype = self.config.kv_channels, self.config.params_dtype
        self.packs = packed_attention_here(parallel.device, dtype, width)
        packed = packed_attention if self.packs else None
        self.caches = [ChunkCache(c, slots, length, parallel.device, packed) for c in chunks]
        self._replica = parallel.group("mp")
        sizes = parallel.sizes
        assert self._replica.rank == parallel.pipeline_rank * sizes.tensor + parallel.tensor_rank, "order of the group"
        self._answerer = (sizes.pipeline - 1) * sizes.tensor
        self._stale = True
        self.generation = 0
        """How often the weights have changed, as passes have noticed."""

    @property
    def ready(self) -> bool:
        """Whether the last pass was with these weights; who has trained them has put the model into training mode."""
        return not self._stale and not any(unwrap(c).training for c in self.chunks)

    @property
    def multiple(self) -> int:
        """What the number of tokens of a pass must be a multiple of."""
        sizes = self.parallel.sizes
        return (sizes.tensor if sizes.sequence else 1) * token_multiple(self.config)

    def weights_changed(self) -> None:
        """Say that the weights are others than at the last pass."""
        self._stale = True

    def run(self, ids: Tensor, layout: Layout, answer: Answerer, count: int) -> Outcome:
        """Feed `ids` [1, tokens with padding]; `answer` is called on the last stage and returns `count` numbers."""
        if not self.ready:
            self._refresh()
        with ExitStack() as stack:
            stack.enter_context(self._explained())
            stack.enter_context(histories_kept(self.chunks))
            for cache in self.caches:
                stack.enter_context(cache.plugged_in(layout))
            outcome = self._stages(ids, layout, answer, count)
            self._tell(outcome.values)
        return outcome

    def ask_again(self, last: Outcome, answer: Answerer) -> Tensor:
        """Other answers from the hidden states of the last pass, as many as before; all processes call it."""
        with self._explained(), torch.no_grad():
            values = last.values
            if last.hidden is not None:
                assert last.output is not None
                values = answer(last.hidden, last.output)
            self._tell(values)
        return values

    def _refresh(self) -> None:
        for chunk in self.chunks:
            chunk.eval()
        renew_quantised_weights(self.chunks)
        self.generation += 1
        self._stale = False

    def _explained(self) -> Any:
        return explain_timeouts(self._replica, "rollout") if self._replica.size > 1 else nullcontext()

    def _tell(self, values: Tensor) -> None:
        if self._replica.size > 1:
            dist.broadcast(values, group=self.parallel.pg_collection.mp, group_src=self._answerer)

    def _stages(self, ids: Tensor, layout: Layout, answer: Answerer, count: int) -> Outcome:
        """Pipeline stages in turn; the answers on the last, room for them on the others."""
        sizes, rank = self.parallel.sizes, self.parallel.pipeline_rank
        group = self.parallel.pg_collection.pp
        total = sizes.pipeline * (sizes.virtual_pipeline or 1)
        ranks = dist.get_process_group_ranks(group) if total > 1 else []
        local = ids.size(1) // (sizes.tensor if sizes.sequence else 1)
        outcome = None

        def process(**given: Any) -> Tensor:
            nonlocal outcome
            hidden, output = whole_hidden(given)
            outcome = Outcome(answer(hidden[:, 0], output), hidden[:, 0], output)
            return outcome.values

        for stage in range(total):
            if stage % sizes.pipeline != rank:
                continue
            chunk = self.chunks[stage // sizes.pipeline]
            if stage:
                hidden = torch.empty(
                    local, 1, self.config.hidden_size, dtype=self.config.pipeline_dtype, device=ids.device
                )
                dist.recv(hidden, src=ranks[(stage - 1) % sizes.pipeline], group=group)
                unwrap(chunk).set_input_tensor(hidden)
            positions = layout.positions.unsqueeze(0)
            given = chunk(input_ids=ids, position_ids=positions, attention_mask=None, output_processor=process)
            if stage < total - 1:
                dist.send(given.contiguous(), dst=ranks[(stage + 1) % sizes.pipeline], group=group)
        if outcome is None:
            return Outcome(ids.new_empty(count, dtype=torch.float64), None, None)
        return outcome
