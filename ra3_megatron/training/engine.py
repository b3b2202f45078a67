"""The one training engine: micro-batches through Megatron's schedule, a sum of loss components, the optimizer.

The engine is blind to the algorithm. Before the schedule starts it reduces, over all replicas, each component's token
weight; a micro-batch's loss is divided by these global numbers, so gradients are plain sums over micro-batches,
replicas and context-parallel shards, and neither loss nor gradient depends on how a batch was split.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from ra3_megatron.algo.logprobs import token_log_probs
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.run import RunConfig
from ra3_megatron.data.batch import TrainBatch, context_parallel_slice
from ra3_megatron.model.factory import unwrap
from ra3_megatron.model.fp8_passes import histories_kept
from ra3_megatron.model.fusions import fuse_weight_gradients
from ra3_megatron.model.precision import layers_in_use, renew_quantised_weights
from ra3_megatron.parallel.collectives import explain_timeouts
from ra3_megatron.parallel.groups import Parallel
from ra3_megatron.parallel.phases import phase
from ra3_megatron.training.actions import ActionRows, ActionTable, TokenScores, scattered, score_actions
from ra3_megatron.training.components import LossComponent
from ra3_megatron.training.fp8_watch import Fp8Watch
from ra3_megatron.training.nonfinite import NonFiniteStep, explain_nonfinite
from ra3_megatron.training.optimizer import build_optimizer, build_scheduler
from ra3_megatron.training.schedule import at_rows, label_rows, run_schedule, vocabulary_shard


@dataclass(frozen=True)
class LossResult:
    """Losses of one global batch."""

    loss: float
    """Sum of coefficient x component, nats."""
    components: dict[str, float]
    """Weighted mean of every component over the global batch (its sum over that of its normaliser, if it names one),
    nats; NaN-free when its weight is 0 (then 0)."""
    weights: dict[str, float]
    """Global token weight of every component; a number of tokens when weights are 0 or 1."""
    monitors: dict[str, float]
    """Sums and maxima over the global batch that components keep (`LossComponent.sums`, `.maxima`)."""


@dataclass(frozen=True)
class StepResult(LossResult):
    """What one optimizer step did."""

    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    lr: float
    """Learning rate used."""
    skipped: bool
    """Whether the update was left out because a loss or gradient was not finite."""
    fp8: dict[str, float] = field(default_factory=dict)
    """Metrics of FP8 that were due at this step (`training/fp8_watch.py`)."""


class TrainEngine:
    """Model, optimizer and schedule of one training stage.

    `chunks` are this rank's bare model chunks. With `optimizer` settings of `config` the parameters are wrapped in
    Megatron's DistributedDataParallel and its distributed optimizer, whatever the number of replicas. `actions` is
    needed by components that read actions (ValueError without). `label_temperature` > 0 divides the logits of labels
    for components that name no temperature of their own: the one at which a policy sampled them. Each further
    temperature costs another copy of the logits.
    """

    def __init__(
        self,
        config: RunConfig,
        architecture: Architecture,
        parallel: Parallel,
        chunks: Sequence[torch.nn.Module],
        components: Sequence[LossComponent],
        total_steps: int,
        actions: ActionTable | None = None,
        label_temperature: float = 1.0,
    ) -> None:
        if label_temperature <= 0:
            raise ValueError(f"label_temperature {label_temperature}; it divides the logits; use a number above 0")
        readers = [c.name for c in components if c.reads == "actions"]
        if readers and actions is None:
            raise ValueError(f"loss components {readers} read actions; give the engine an ActionTable")
        self.actions = actions
        self.label_temperature = label_temperature
        self._reads_actions = bool(readers)
        self._sums = tuple(name for c in components for name in c.sums)
        self._maxima = tuple(name for c in components for name in c.maxima)
        self.config = config
        self.architecture = architecture
        self.parallel = parallel
        self.components = tuple(components)
        self.chunks = [_wrap(config, chunk) for chunk in chunks]
        self.model_config: Any = unwrap(chunks[0]).config
        self.optimizer = build_optimizer(config, self.chunks)
        self.scheduler = build_scheduler(config, self.optimizer, total_steps)
        self._hook_schedule()
        self.vocab = vocabulary_shard(chunks, architecture, parallel)
        self._fp8 = Fp8Watch(config.model, self.chunks, parallel, self.vocab)
        if config.model.precision != "fp32":
            # What was built, not what was asked for; that FP8 runs is said after the first step.
            lines = layers_in_use(self.chunks, parallel)
            if parallel.is_main:
                print("\n".join(lines), flush=True)

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
        Raises NonFiniteStep when a loss or gradient is not finite and `train.on_nonfinite` is `stop`, Fp8Diverged when
        FP8 and BF16 disagree on the batch, Fp8NotInUse when no layer ran in the FP8 that was asked for.
        """
        self.parallel.mark(f"train step {step}")
        probed = self._fp8.probe(step, batches)
        with phase("update"), explain_timeouts(self.parallel.world, f"train step {step}"):
            for chunk in self.chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            with phase("forward and backward"), self._fp8.watching(step) as fp8:
                result, local = self._run(batches, forward_only=False)
            with phase("gradient norm"):
                self.optimizer.prepare_grads()
                # One number for all ranks: it is reduced over the whole world, so every rank decides alike.
                grad_norm = float(self.optimizer.get_grad_norm())
            self.scheduler.step(increment=1)
            lr = max(group["lr"] for group in self.optimizer.param_groups)
            finite = math.isfinite(result.loss) and math.isfinite(grad_norm)
            if finite:
                with phase("optimizer"):
                    self._update(grad_norm)
        if not finite:
            message = explain_nonfinite(self.parallel, self.chunks, step, result.loss, grad_norm, local, batches)
            if self.config.train.on_nonfinite == "stop":
                raise NonFiniteStep(message)
            if self.parallel.is_main:
                print(f"skipped: {message}", flush=True)
        return StepResult(**vars(result), grad_norm=grad_norm, lr=lr, skipped=not finite, fp8={**probed, **fp8})

    def _update(self, grad_norm: float) -> None:
        clip = self.config.optimizer.clip_grad
        if clip > 0:
            clip_grad_by_total_norm_fp32(self.optimizer.get_parameters(), max_norm=clip, total_norm=grad_norm)
        self.optimizer.step_with_ready_grads()
        renew_quantised_weights(self.chunks)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[TrainBatch]) -> LossResult:
        """Losses of one global batch without gradients or update; the same splitting rules as `train_step`."""
        self.parallel.mark("evaluate")
        with explain_timeouts(self.parallel.world, "evaluate"):
            for chunk in self.chunks:
                chunk.eval()
            with histories_kept(self.chunks):
                result, _ = self._run(batches, forward_only=True)
        return result

    # ---------------------------------------------------------------- schedule

    def _run(self, batches: Sequence[TrainBatch], forward_only: bool) -> tuple[LossResult, list[float]]:
        sums = self._global_sums(batches)
        rank, size = self.parallel.context_rank, self.parallel.sizes.context
        local = [context_parallel_slice(b, rank, size) for b in batches]
        read = list(dict.fromkeys(c.weight_key for c in self.components if sums[c.weight_key]))
        rows = [label_rows(b, read) for b in local]
        local = [at_rows(b, r) for b, r in zip(local, rows, strict=True)]
        loss = partial(self._loss, sums, self._action_rows(local))
        stored = run_schedule(self.parallel, self.chunks, local, loss, forward_only, rows)
        return self._collect(stored, sums), [self._local_loss(s) for s in stored]

    def _action_rows(self, batches: Sequence[TrainBatch]) -> list[ActionRows] | None:
        """Where the actions are, sought before the schedule starts: no forward pass waits for a count.

        On every stage, so that all raise for a bad batch.
        """
        if not self._reads_actions:
            return None
        assert self.actions is not None
        return [ActionRows.find(b, self.actions).to(self.parallel.device) for b in batches]

    def _local_loss(self, stored: Tensor) -> float:
        """Sum of a micro-batch's shares that count in the loss."""
        return sum(x for x, c in zip(stored.tolist(), self.components, strict=False) if c.coefficient)

    def _global_sums(self, batches: Sequence[TrainBatch]) -> dict[str, float]:
        """Sums over all replicas of the weights that components name, by key, in float64.

        Raises ValueError where tokens would count and nothing divides them.
        """
        keys = list(dict.fromkeys(k for c in self.components for k in (c.weight_key, c.normaliser_key)))
        found = torch.tensor(
            [sum(float(b.weights[k].sum(dtype=torch.float64)) for b in batches) for k in keys],
            dtype=torch.float64,
            device=self.parallel.device,
        )
        if self.parallel.sizes.data > 1:
            dist.all_reduce(found, group=self.parallel.pg_collection.dp)
        sums = dict(zip(keys, found.tolist(), strict=True))
        for component in self.components:
            if sums[component.weight_key] and not sums[component.normaliser_key]:
                raise ValueError(
                    f"loss component '{component.name}' has tokens and its normaliser '{component.normaliser_key}' the "
                    "global sum 0"
                )
        return sums

    def _loss(
        self,
        sums: dict[str, float],
        rows: list[ActionRows] | None,
        number: int,
        batch: TrainBatch,
        output: Tensor,
    ):
        """Loss of a micro-batch, normalised; with it the components' detached shares, then sums, then maxima."""
        # squeeze, not [0]: the backward pass of an index allocates and clears a second [tokens, vocabulary].
        scores = self._scores(sums, rows[number] if rows else None, batch, output.squeeze(0))
        zero = torch.zeros((), device=output.device)
        shares, total, monitors = [], zero, dict.fromkeys((*self._sums, *self._maxima), zero)
        for component in self.components:
            if sums[component.weight_key] == 0:
                shares.append(zero)
                continue
            w = batch.weights[component.weight_key]
            # Where, not times, and on both sides: a NaN of a token that does not count must reach neither the sum nor,
            # as 0 x NaN in the backward pass, the gradient.
            counts = w != 0
            with torch.set_grad_enabled(torch.is_grad_enabled() and component.coefficient != 0):
                values = component.per_token(scores[self._temperature(component)].counted(counts), batch)
                share = torch.where(counts, values.loss * w, 0.0).sum() / sums[component.normaliser_key]
            shares.append(share.detach())
            if component.coefficient:
                total = total + component.coefficient * share
            kept = {n: torch.where(counts, values.monitors[n].detach(), 0.0) for n in component.sums + component.maxima}
            monitors |= {n: kept[n].sum() for n in component.sums} | {n: kept[n].amax() for n in component.maxima}
        if not total.requires_grad and output.requires_grad:
            total = total + 0.0 * output.sum()
        # Megatron divides by this count only in its own finalizer, which `_finalize` replaces.
        count = torch.ones((), dtype=torch.int, device=output.device)
        return total, count, torch.stack((*shares, *monitors.values()))

    def _temperature(self, component: LossComponent) -> float | None:
        """Of the labels it reads; none when it reads actions."""
        if component.reads == "actions":
            return None
        return self.label_temperature if component.temperature is None else component.temperature

    def _scores(
        self, sums: dict[str, float], rows: ActionRows | None, batch: TrainBatch, logits: Tensor
    ) -> dict[float | None, TokenScores]:
        """What the components read, by temperature, with a gradient where one needs it; NaN for what none reads."""
        blank = torch.full(batch.labels.shape, torch.nan, device=logits.device)
        readers: dict[float | None, list[LossComponent]] = {}
        for component in self.components:
            if sums[component.weight_key] != 0:
                readers.setdefault(self._temperature(component), []).append(component)
        scores: dict[float | None, TokenScores] = {}
        # Actions first; the labels' last scores take the memory of the logits.
        order = sorted(readers, key=lambda t: (t is not None, t or 0.0))
        for temperature in order:
            needed = any(c.coefficient for c in readers[temperature])
            with torch.set_grad_enabled(torch.is_grad_enabled() and needed):
                if temperature is not None:
                    consume = temperature == order[-1]
                    log_probs = token_log_probs(logits, batch.labels, self.vocab, temperature, consume=consume)
                    scores[temperature] = TokenScores(log_probs, blank, blank, blank)
                else:
                    assert rows is not None
                    assert self.actions is not None
                    found = score_actions(logits, rows, batch.labels, self.actions, self.vocab)
                    scores[None] = TokenScores(blank, **scattered(rows, found, blank))
        return scores

    def _collect(self, stored: list[Tensor], sums: dict[str, float]) -> LossResult:
        """Join the last stage's numbers over micro-batches, context shards and replicas; tell every stage."""
        names, device = [c.name for c in self.components], self.parallel.device
        count = len(names) + len(self._sums)
        if self.parallel.is_last_stage:
            numbers = torch.stack(stored).double()
            found = torch.cat((numbers[:, :count].sum(0), numbers[:, count:].amax(0)))
        else:
            found = torch.zeros(count + len(self._maxima), dtype=torch.float64, device=device)
        pg, sizes = self.parallel.pg_collection, self.parallel.sizes
        if sizes.data * sizes.context > 1:
            added, maxima = found.split((count, len(self._maxima)))
            dist.all_reduce(added, group=pg.dp_cp)
            if len(self._maxima):
                dist.all_reduce(maxima, dist.ReduceOp.MAX, group=pg.dp_cp)
        if sizes.pipeline > 1:
            dist.broadcast(found, src=dist.get_process_group_ranks(pg.pp)[-1], group=pg.pp)
        values = dict(zip((*names, *self._sums, *self._maxima), found.tolist(), strict=True))
        components = {name: values.pop(name) for name in names}
        loss = sum(c.coefficient * components[c.name] for c in self.components if c.coefficient)
        weights = {c.name: sums[c.weight_key] for c in self.components}
        return LossResult(loss=loss, components=components, weights=weights, monitors=values)


def _wrap(config: RunConfig, chunk: torch.nn.Module) -> DistributedDataParallel:
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        use_distributed_optimizer=True,
        fp8_param_gather=config.model.fp8_params,
    )
    wrapped = DistributedDataParallel(config=chunk.config, ddp_config=ddp, module=chunk)
    fuse_weight_gradients(wrapped)
    return wrapped


def _finalize(
    model: list[torch.nn.Module], _num_tokens: Tensor | None = None, pg_collection: Any = None, **options: Any
) -> None:
    """Megatron's own gradient synchronisation without its division: the loss was normalised before."""
    finalize_model_grads(model, None, pg_collection=pg_collection, **options)
