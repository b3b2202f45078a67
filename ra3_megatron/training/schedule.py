"""Micro-batches through Megatron's pipeline schedule, for training and for scoring alike."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from ra3_megatron.algo.logprobs import VocabShard
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.sections import TrainConfig
from ra3_megatron.config.validate import sequence_multiple
from ra3_megatron.data.batch import TrainBatch, collate, context_parallel_indices, context_parallel_slice
from ra3_megatron.data.packing import Packing, TrainSequence, pack
from ra3_megatron.model.attention import set_boundaries, set_prefixes
from ra3_megatron.model.factory import unwrap
from ra3_megatron.model.fp8_passes import histories_kept
from ra3_megatron.parallel.collectives import explain_timeouts
from ra3_megatron.parallel.groups import Parallel

MicroBatchLoss = Callable[[int, TrainBatch, Tensor], tuple[Tensor, Tensor, Any]]
"""`(number of the micro-batch, batch on the device, logits [1, labels, columns]) -> (loss, count, what to keep)`."""

MOST_ROWS = 0.9
"""Share of a micro-batch's tokens up to which the output layer runs on some of them alone: above, all of them cost less
than to pick some."""


def vocabulary_shard(chunks: Sequence[torch.nn.Module], architecture: Architecture, parallel: Parallel) -> VocabShard:
    """Which columns of the vocabulary this process's logits have."""
    columns = unwrap(chunks[-1]).vocab_size // parallel.sizes.tensor
    group = parallel.pg_collection.tp if parallel.sizes.tensor > 1 else None
    return VocabShard(columns * parallel.tensor_rank, architecture.vocab_size, group)


def pack_micro_batches(
    sequences: Sequence[TrainSequence],
    train: TrainConfig,
    parallel: Parallel,
    components: Sequence[str] = (),
    extras: Sequence[str] = (),
) -> tuple[list[TrainBatch], Packing]:
    """Micro-batches of this replica's `sequences`, any number of them, and which window each of them is in.

    Windows follow each other through the micro-batches. Empty windows fill the last one up, and the last group of an
    interleaved pipeline; without sequences there is one group of empty windows. `components`, `extras` as in `collate`.
    Raises UserError for a sequence longer than a window.
    """
    multiple, sizes = sequence_multiple(parallel.sizes.context), parallel.sizes
    packing = pack(np.array([len(s.ids) for s in sequences], dtype=np.int64), train.seq_length, multiple)
    windows = [[sequences[i] for i in packing.window(w)] for w in range(len(packing))]
    size = train.micro_batch_size
    group = size * (sizes.pipeline if sizes.virtual_pipeline else 1)
    windows += [[] for _ in range(-len(windows) % group or (group if not windows else 0))]
    parts = [windows[i : i + size] for i in range(0, len(windows), size)]
    return [collate(p, train.seq_length, 0, multiple, components, extras) for p in parts], packing


def run_schedule(
    parallel: Parallel,
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[TrainBatch],
    loss: MicroBatchLoss,
    forward_only: bool,
    rows: Sequence[Tensor | None] | None = None,
) -> list[Any]:
    """Run this replica's micro-batches; returns what `loss` kept of each, empty before the last pipeline stage.

    `batches` are this rank's context-parallel shards, all of one length, on any device; the same on all its tensor-
    and pipeline-parallel ranks. The chunks' configuration must have `variable_seq_lengths` off. `rows`: of `label_rows`
    for each of the batches, whose labels are then of these tokens alone (`at_rows`): no other logits are computed.
    """
    device, sizes = parallel.device, parallel.sizes
    chosen = [None if r is None else r.to(device, non_blocking=True) for r in rows or [None] * len(batches)]
    prepared = [
        (number, b if device.type == "cpu" else b.to(device), _packed(b, device), r)
        for number, (b, r) in enumerate(zip(batches, chosen, strict=True))
    ]
    schedule = get_forward_backward_func(pp_size=sizes.pipeline, vp_size=sizes.virtual_pipeline)
    return schedule(
        forward_step_func=partial(_forward_step, parallel, loss),
        data_iterator=[iter(prepared) for _ in chunks] if len(chunks) > 1 else iter(prepared),
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        # Packed windows are one long row, so the pipeline's messages are [tokens, 1, hidden].
        seq_length=batches[0].input_ids.numel() * sizes.context,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def forward_only(
    parallel: Parallel,
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[TrainBatch],
    rows: int,
    score: Callable[[TrainBatch, Tensor], Tensor],
    what: str,
) -> Tensor:
    """Numbers about every token of this replica's micro-batches, without gradients and in evaluation mode.

    `batches` are whole, not context-parallel shards. `score(batch, logits [tokens, columns])` gives `rows` numbers per
    token of its shard, [rows, tokens]; it may use the memory of the logits. Returns float64 [batches, rows, tokens of a
    batch], the same on every process of the replica. `what` names the work in the errors of a hang.
    """
    sizes, replica = parallel.sizes, parallel.group("mp")
    parallel.mark(what)
    for chunk in chunks:
        chunk.eval()
    local = [context_parallel_slice(b, parallel.context_rank, sizes.context) for b in batches]

    def keep(_number: int, batch: TrainBatch, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        zero = torch.zeros((), device=output.device)
        return zero, torch.ones((), dtype=torch.int, device=output.device), score(batch, output.squeeze(0))

    with torch.no_grad(), histories_kept(chunks), explain_timeouts(replica, what):
        stored = run_schedule(parallel, chunks, local, keep, forward_only=True)
        shape = (len(batches), rows, batches[0].input_ids.numel())
        found = torch.zeros(shape, dtype=torch.float64, device=parallel.device)
        if parallel.is_last_stage:
            for row, batch, values in zip(found, batches, stored, strict=True):
                if sizes.context == 1:
                    row.copy_(values)
                else:
                    index = context_parallel_indices(batch.cu_seqlens, parallel.context_rank, sizes.context)
                    row[:, index.to(parallel.device)] = values.double()
            if sizes.context > 1:
                dist.all_reduce(found, group=parallel.pg_collection.cp)
        if sizes.pipeline > 1:
            group = parallel.pg_collection.pp
            dist.broadcast(found, src=dist.get_process_group_ranks(group)[-1], group=group)
    return found


def _forward_step(parallel: Parallel, loss: MicroBatchLoss, iterator: Iterator[Any], model: torch.nn.Module):
    number, batch, packed, rows = next(iterator)
    parallel.whereabouts.alive()
    output = model(
        input_ids=batch.input_ids.unsqueeze(0),
        position_ids=batch.position_ids.unsqueeze(0),
        attention_mask=None,
        packed_seq_params=packed,
        output_processor=None if rows is None else partial(_some_logits, rows),
    )
    return output, partial(loss, number, batch)


def label_rows(batch: TrainBatch, keys: Sequence[str]) -> Tensor | None:
    """Tokens with a weight under one of `keys`, int64 [rows], at least one; none where picking them does not pay."""
    counted = torch.zeros(batch.labels.shape, dtype=torch.bool, device=batch.labels.device)
    for key in keys:
        counted |= batch.weights[key] != 0
    rows = counted.nonzero().squeeze(1)
    if len(rows) > MOST_ROWS * len(counted):
        return None
    # Every micro-batch takes part in the backward pass, one without any such token as well.
    return rows if len(rows) else torch.zeros(1, dtype=torch.int64, device=rows.device)


def at_rows(batch: TrainBatch, rows: Tensor | None) -> TrainBatch:
    """The batch with labels, and what stands beside them, of the tokens `rows` alone; its input stays whole."""
    if rows is None:
        return batch
    return replace(
        batch,
        labels=batch.labels[rows],
        weights={k: v[rows] for k, v in batch.weights.items()},
        extras={k: v[rows] for k, v in batch.extras.items()},
        kinds=None if batch.kinds is None else batch.kinds[rows],
    )


def whole_hidden(given: dict[str, Any]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Of what Megatron gives an output processor: hidden states of all tokens [tokens, 1, hidden], and the output layer
    for some of them, [rows, 1, hidden] -> [rows, 1, columns].

    Under sequence parallelism they are gathered here instead of in the layer, which would give logits of every token
    (as Megatron-Core's own inference does); the gradients that the layer adds up are cut to shards again.
    """
    hidden, layer, weight = given["hidden_states"], given["output_layer"], given["output_weight"]
    if not layer.sequence_parallel:
        return hidden, lambda some: layer(some, weight=weight)[0]

    def logits(some: Tensor) -> Tensor:
        layer.sequence_parallel = False
        try:
            return layer(some, weight=weight)[0]
        finally:
            layer.sequence_parallel = True

    return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=layer.tp_group), logits


def _some_logits(rows: Tensor, **given: Any) -> Tensor:
    """Megatron's output processor: logits of the tokens `rows`, [1, rows, columns]."""
    hidden, logits = whole_hidden(given)
    return logits(hidden.index_select(0, rows)).transpose(0, 1)


def _packed(batch: TrainBatch, device: torch.device) -> PackedSeqParams:
    """Boundaries of the whole micro-batch; context-parallel attention derives its shard's from them.

    Padding belongs to the sequences, so the padded boundaries are the same tensor: Transformer Engine insists on having
    them under context parallelism, and that they are one object tells it that nothing lies between sequences.
    """
    cu_seqlens = batch.cu_seqlens.to(device, non_blocking=True)
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )
    if batch.cu_seqlens.device.type == "cpu":
        set_boundaries(params, batch.cu_seqlens.tolist())
    if batch.prefixes is not None:
        set_prefixes(params, batch.prefixes)
    return params
