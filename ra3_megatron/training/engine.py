"""The one training engine: micro-batches through Megatron's schedule, a sum of loss components, the optimizer.

The engine is blind to the algorithm. Before the schedule starts it reduces, over all replicas, each component's token
weight; a micro-batch's loss is divided by these global numbers, so gradients are plain sums over micro-batches,
replicas and context-parallel shards, and neither loss nor gradient depends on how a batch was split.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ra3_megatron.algo.logprobs import VocabShard, token_log_probs
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.run import RunConfig
from ra3_megatron.data.batch import TrainBatch, context_parallel_slice
from ra3_megatron.model.factory import unwrap
from ra3_megatron.parallel.collectives import explain_timeouts
from ra3_megatron.parallel.groups import Parallel
from ra3_megatron.training.components import LossComponent
from ra3_megatron.training.nonfinite import NonFiniteStep, explain_nonfinite
from ra3_megatron.training.optimizer import build_optimizer, build_scheduler


@dataclass(frozen=True)
class LossResult:
    """Losses of one global batch."""

    loss: float
    """Sum of coefficient x component, nats."""
    components: dict[str, float]
    """Weighted mean of every component over the global batch, nats; NaN-free when its weight is 0 (then 0)."""
    weights: dict[str, float]
    """Global token weight of every component; a number of tokens when weights are 0 or 1."""


@dataclass(frozen=True)
class StepResult(LossResult):
    """What one optimizer step did."""

    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    lr: float
    """Learning rate used."""
    skipped: bool
    """Whether the update was left out because a loss or gradient was not finite."""


class TrainEngine:
    """Model, optimizer and schedule of one training stage.

    `chunks` are this rank's bare model chunks. With `optimizer` settings of `config` the parameters are wrapped in
    Megatron's DistributedDataParallel and its distributed optimizer, whatever the number of replicas.
    """

    def __init__(
        self,
        config: RunConfig,
        architecture: Architecture,
        parallel: Parallel,
        chunks: Sequence[torch.nn.Module],
        components: Sequence[LossComponent],
        total_steps: int,
    ) -> None:
        self.config = config
        self.architecture = architecture
        self.parallel = parallel
        self.components = tuple(components)
        self.chunks = [_wrap(config, chunk) for chunk in chunks]
        self.model_config: Any = unwrap(chunks[0]).config
        self.optimizer = build_optimizer(config, self.chunks)
        self.scheduler = build_scheduler(config, self.optimizer, total_steps)
        self._hook_schedule()
        columns = unwrap(chunks[-1]).vocab_size // parallel.sizes.tensor
        self.vocab = VocabShard(
            start=columns * parallel.tensor_rank,
            vocab_size=architecture.vocab_size,
            group=parallel.pg_collection.tp if parallel.sizes.tensor > 1 else None,
        )

    def _hook_schedule(self) -> None:
        """Tell Megatron's schedule how to scale, synchronise and finish gradients."""
        c = self.model_config
        c.grad_scale_func = self.optimizer.scale_loss
        c.finalize_model_grads_func = _finalize
        # Packed micro-batches have one length: pipeline stages need not tell each other shapes before every message.
        c.variable_seq_lengths = False
        if self.config.parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            c.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        if self.config.parallel.overlap_param_gather:
            start = [chunk.start_param_sync for chunk in self.chunks]
            c.param_sync_func = start if len(start) > 1 else start[0]

    # ---------------------------------------------------------------- one step

    def train_step(self, batches: Sequence[TrainBatch], step: int) -> StepResult:
        """Forward, backward and update on one global batch.

        `batches` are this replica's micro-batches, the same on all its tensor-, pipeline- and context-parallel ranks.
        Raises NonFiniteStep when a loss or gradient is not finite and `train.on_nonfinite` is `stop`.
        """
        self.parallel.mark(f"train step {step}")
        with explain_timeouts(self.parallel.world, f"train step {step}"):
            for chunk in self.chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            result, local = self._run(batches, forward_only=False)
            self.optimizer.prepare_grads()
            # One number for all ranks: it is reduced over the whole world, so every rank decides alike.
            grad_norm = float(self.optimizer.get_grad_norm())
            self.scheduler.step(increment=1)
            lr = max(group["lr"] for group in self.optimizer.param_groups)
            finite = math.isfinite(result.loss) and math.isfinite(grad_norm)
            if finite:
                self._update(grad_norm)
        if not finite:
            message = explain_nonfinite(self.parallel, self.chunks, step, result.loss, grad_norm, local, batches)
            if self.config.train.on_nonfinite == "stop":
                raise NonFiniteStep(message)
            if self.parallel.is_main:
                print(f"skipped: {message}", flush=True)
        return StepResult(result.loss, result.components, result.weights, grad_norm, lr, skipped=not finite)

    def _update(self, grad_norm: float) -> None:
        clip = self.config.optimizer.clip_grad
        if clip > 0:
            clip_grad_by_total_norm_fp32(self.optimizer.get_parameters(), max_norm=clip, total_norm=grad_norm)
        self.optimizer.step_with_ready_grads()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[TrainBatch]) -> LossResult:
        """Losses of one global batch without gradients or update; the same splitting rules as `train_step`."""
        self.parallel.mark("evaluate")
        with explain_timeouts(self.parallel.world, "evaluate"):
            for chunk in self.chunks:
                chunk.eval()
            result, _ = self._run(batches, forward_only=True)
        return result

    # ---------------------------------------------------------------- schedule

    def _run(self, batches: Sequence[TrainBatch], forward_only: bool) -> tuple[LossResult, list[float]]:
        weights = self._global_weights(batches)
        sizes, device = self.parallel.sizes, self.parallel.device
        local = [
            _to_device(context_parallel_slice(b, self.parallel.context_rank, sizes.context), device) for b in batches
        ]
        packed = [_packed(b, device) for b in batches]
        prepared = list(zip(local, packed, strict=True))
        schedule = get_forward_backward_func(pp_size=sizes.pipeline, vp_size=sizes.virtual_pipeline)
        stored = schedule(
            forward_step_func=partial(self._forward_step, weights),
            data_iterator=[iter(prepared) for _ in self.chunks] if len(self.chunks) > 1 else iter(prepared),
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            # Packed windows are one long row, so the pipeline's messages are [tokens, 1, hidden].
            seq_length=batches[0].input_ids.numel(),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return self._collect(stored, weights), [float(s.sum()) for s in stored]

    def _global_weights(self, batches: Sequence[TrainBatch]) -> dict[str, float]:
        """Token weight of every component over all replicas, in float64."""
        sums = torch.tensor(
            [sum(float(b.weights[c.name].sum(dtype=torch.float64)) for b in batches) for c in self.components],
            dtype=torch.float64,
            device=self.parallel.device,
        )
        if self.parallel.sizes.data > 1:
            dist.all_reduce(sums, group=self.parallel.pg_collection.dp)
        return dict(zip((c.name for c in self.components), sums.tolist(), strict=True))

    def _forward_step(self, weights: dict[str, float], iterator: Iterator[Any], model: torch.nn.Module):
        batch, packed = next(iterator)
        output = model(
            input_ids=batch.input_ids.unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            attention_mask=None,
            packed_seq_params=packed,
        )
        return output, partial(self._loss, weights, batch)

    def _loss(self, weights: dict[str, float], batch: TrainBatch, output: Tensor):
        """Scalar loss of a micro-batch, already normalised, and the components' detached shares."""
        # squeeze, not [0]: the backward pass of an index allocates and clears a second [tokens, vocabulary].
        log_probs = token_log_probs(output.squeeze(0), batch.labels, self.vocab, consume=True)
        shares, total = [], log_probs.new_zeros(())
        for component in self.components:
            if weights[component.name] == 0:
                shares.append(log_probs.new_zeros(()))
                continue
            w = batch.weights[component.name]
            # Where, not times, and on both sides: a NaN of a token that does not count must reach neither the sum nor,
            # as 0 x NaN in the backward pass, the gradient.
            counts = w != 0
            values = torch.where(counts, component.per_token(torch.where(counts, log_probs, 0.0), batch) * w, 0.0)
            share = values.sum() / weights[component.name]
            shares.append(share.detach())
            total = total + component.coefficient * share
        if not total.requires_grad and log_probs.requires_grad:
            total = total + 0.0 * log_probs.sum()
        # Megatron divides by this count only in its own finalizer, which `_finalize` replaces.
        count = torch.ones((), dtype=torch.int, device=output.device)
        return total, count, torch.stack(shares)

    def _collect(self, stored: list[Tensor], weights: dict[str, float]) -> LossResult:
        """Sum the last stage's shares over micro-batches, context shards and replicas; tell every stage."""
        pg = self.parallel.pg_collection
        device = self.parallel.device
        if self.parallel.is_last_stage:
            shares = torch.stack(stored).sum(0, dtype=torch.float64)
        else:
            shares = torch.zeros(len(self.components), dtype=torch.float64, device=device)
        if self.parallel.sizes.data * self.parallel.sizes.context > 1:
            dist.all_reduce(shares, group=pg.dp_cp)
        if self.parallel.sizes.pipeline > 1:
            dist.broadcast(shares, src=dist.get_process_group_ranks(pg.pp)[-1], group=pg.pp)
        values = dict(zip((c.name for c in self.components), shares.tolist(), strict=True))
        loss = sum(c.coefficient * values[c.name] for c in self.components)
        return LossResult(loss=loss, components=values, weights=weights)


def _wrap(config: RunConfig, chunk: torch.nn.Module) -> DistributedDataParallel:
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        use_distributed_optimizer=True,
    )
    return DistributedDataParallel(config=chunk.config, ddp_config=ddp, module=chunk)


def _finalize(
    model: list[torch.nn.Module], _num_tokens: Tensor | None = None, pg_collection: Any = None, **options: Any
) -> None:
    """Megatron's own gradient synchronisation without its division: the loss was normalised before."""
    finalize_model_grads(model, None, pg_collection=pg_collection, **options)


def _packed(batch: TrainBatch, device: torch.device) -> PackedSeqParams:
    """Boundaries of the whole micro-batch; context-parallel attention derives its shard's from them."""
    cu_seqlens = batch.cu_seqlens.to(device, non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )


def _to_device(batch: TrainBatch, device: torch.device) -> TrainBatch:
    return batch if device.type == "cpu" else batch.to(device)
