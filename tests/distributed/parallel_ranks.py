"""What the ranks of test_parallel.py do: train a tiny model in several layouts, collectives that miss a rank."""

import json
import os
import time
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, vocab_parallel_cross_entropy

from ra3_megatron.config.sections import ModelConfig, ParallelConfig
from ra3_megatron.model.attention import context_parallel_share, packed_params
from ra3_megatron.model.factory import build_model, padded_vocab_size, unwrap
from ra3_megatron.parallel import collectives
from ra3_megatron.parallel.groups import Parallel, initialize, seed_everything
from ra3_megatron.parallel.whereabouts import CollectiveTimeout, PeerFailed
from tests.unit.model.hf_pairs import ARCHITECTURES, SHAPE, load, megatron_weights, random_hf

VOCAB = SHAPE["vocab_size"]
LENGTHS = (8, 40, 16, 32)
"""Packed window: every length is a multiple of 2 x CP for CP up to 4."""


def _windows(vocab: int) -> list[dict[str, torch.Tensor]]:
    """Two packed micro-batches, the same on every replica; the second has masked tokens."""
    generator = torch.Generator().manual_seed(5)
    total = sum(LENGTHS)
    out = []
    for mask_from in (total, 60):
        ids = torch.randint(0, vocab, (total + 1,), generator=generator)
        weight = (torch.arange(total) < mask_from).float()
        out.append({"ids": ids[:-1], "labels": ids[1:], "weight": weight})
    return out


def _forward_step(parallel: Parallel, logits_seen: list[torch.Tensor], iterator: Any, model: Any) -> Any:
    batch = next(iterator)
    share = context_parallel_share(LENGTHS, parallel.sizes.context, parallel.context_rank)
    ids, labels, weight = (batch[k][share] for k in ("ids", "labels", "weight"))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[share]
    packed = packed_params(LENGTHS, parallel.device, parallel.sizes.context)
    out = model(ids[None], positions[None], None, packed_seq_params=packed)

    def loss(logits: torch.Tensor) -> Any:
        full = gather_from_tensor_model_parallel_region(logits.detach(), group=parallel.group("tp").device_group)
        logits_seen.append(full[0].clone())
        # Rows that pad the vocabulary are no token: without this the loss would depend on the tensor-parallel size.
        columns = torch.arange(logits.shape[-1]) + parallel.tensor_rank * logits.shape[-1]
        logits = logits.masked_fill(columns >= VOCAB, -1e9)
        nll = vocab_parallel_cross_entropy(logits.transpose(0, 1).float().contiguous().clone(), labels[:, None])
        total = (nll[:, 0] * weight).sum()
        return total, weight.sum().int(), {"nll": torch.stack((total.detach(), weight.sum()))}

    return out, loss


def _train(parallel: Parallel, name: str, model_config: ModelConfig, steps: int) -> dict[str, Any]:
    """Train `steps` steps from the Hugging Face weights; returns mean losses, grad norms and the first logits."""
    arch = ARCHITECTURES[name]
    seed_everything(7, parallel)
    chunks: list[Any] = build_model(arch, model_config, parallel)
    vocab = padded_vocab_size(arch.vocab_size, model_config.vocab_multiple, parallel.sizes.tensor)
    load([unwrap(c) for c in chunks], megatron_weights(arch, random_hf(arch), vocab), parallel)
    config = unwrap(chunks[0]).config
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    chunks = [DistributedDataParallel(config, ddp, c, pg_collection=parallel.pg_collection) for c in chunks]
    config.finalize_model_grads_func = finalize_model_grads
    options = OptimizerConfig(
        lr=1e-3, weight_decay=0.1, clip_grad=1.0, use_distributed_optimizer=True, bf16=model_config.precision == "bf16"
    )
    optimizer = get_megatron_optimizer(options, chunks)
    config.no_sync_func = None
    run = get_forward_backward_func()
    losses, norms, logits = [], [], None
    for _ in range(steps):
        seen: list[torch.Tensor] = []
        for c in chunks:
            c.zero_grad_buffer()
        optimizer.zero_grad()
        windows = _windows(arch.vocab_size)
        reduced = run(
            forward_step_func=lambda it, m, seen=seen: _forward_step(parallel, seen, it, m),
            data_iterator=[iter(windows) for _ in chunks] if len(chunks) > 1 else iter(windows),
            model=chunks,
            num_microbatches=len(windows),
            seq_length=sum(LENGTHS) // parallel.sizes.context,
            micro_batch_size=1,
            forward_only=False,
        )
        _, norm, _ = optimizer.step()
        norms.append(float(norm))
        if parallel.is_last_stage:
            both = sum(r["nll"] for r in reduced)
            both = collectives.all_reduce_sum(parallel.group("cp"), both, "loss")
            losses.append(float(both[0] / both[1]))
            logits = logits if logits is not None else torch.stack(seen)[..., : arch.vocab_size]
    return {"losses": losses, "norms": norms, "logits": logits}


def layouts(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Train every case; `parallel` and `model` are config fields, case 0 is the reference of its architecture."""
    reference: dict[str, Any] = {}
    out: dict[str, Any] = {}
    for case in cases:
        parallel = initialize(ParallelConfig(timeout_s=60, **case["parallel"]))
        found = _train(parallel, case["arch"], ModelConfig(vocab_multiple=8, **case.get("model", {})), steps=3)
        gap = None
        if case["arch"] not in reference:
            reference[case["arch"]] = found
        if found["logits"] is not None:
            share = context_parallel_share(LENGTHS, parallel.sizes.context, parallel.context_rank)
            gap = float((found["logits"] - reference[case["arch"]]["logits"][:, share]).abs().max())
        out[case["name"]] = {"losses": found["losses"], "norms": found["norms"], "logits_gap": gap}
        parallel.shutdown()
    return out


def exchange_late_missing(absent: int) -> dict[str, Any]:
    """Collectives on the world and on tensor-parallel groups; a rank that comes late; a rank that never comes."""
    parallel = initialize(ParallelConfig(tensor=2, timeout_s=60))
    world, tp = parallel.world, parallel.group("tp")
    out: dict[str, Any] = {
        "sum": collectives.all_reduce_sum(world, parallel.rank + 1, "sum"),
        "tp_sum": collectives.all_reduce_sum(tp, float(parallel.rank), "tp sum"),
        "max": collectives.all_reduce_max(world, torch.tensor([parallel.rank, -parallel.rank]), "max").tolist(),
        "object": collectives.broadcast_object(tp, {"from": parallel.rank}, "object", source=1),
        "gathered": collectives.gather_objects(world, [parallel.rank], "gather"),
        "data_rank": parallel.data_rank,
    }
    collectives.barrier(world, "before late")
    if parallel.rank == absent:
        time.sleep(2.5)
    out["late_sum"] = collectives.all_reduce_sum(world, 1, "late sum", seconds=30)
    if parallel.rank == absent:
        time.sleep(2.5)
    collectives.barrier(world, "late barrier", seconds=30)
    parallel.mark("train step 39")
    collectives.barrier(parallel.group("dp"), "all have marked")
    parallel.mark("train step 39")
    if parallel.rank == absent:
        time.sleep(8)
        return out
    calls = {
        "barrier": lambda: collectives.barrier(world, "save step 40", seconds=1.5),
        "sum": lambda: collectives.all_reduce_sum(world, 1, "count tokens", seconds=1.5),
    }
    for name, call in calls.items():
        start = time.monotonic()
        try:
            call()
        except CollectiveTimeout as error:
            out["missing " + name] = [str(error), error.missing, time.monotonic() - start]
    return out


def fail_then_die(culprit: int) -> dict[str, str]:
    """One rank raises inside a phase; in a second life it dies inside a collective that is not ours."""
    seen = {}
    parallel = initialize(ParallelConfig(timeout_s=60))
    try:
        with collectives.raise_everywhere(parallel.world, "read shard"):
            if parallel.rank == culprit:
                raise ValueError("shard 3 is torn")
    except (ValueError, PeerFailed) as error:
        seen["fail"] = f"{type(error).__name__}: {error}"
    parallel.shutdown()

    parallel = initialize(ParallelConfig(timeout_s=20))
    parallel.mark("train step 1")
    collectives.barrier(parallel.world, "start")
    try:
        with collectives.deadline(parallel.world, "train step 2", seconds=30):
            if parallel.rank == culprit:
                print(json.dumps(seen), flush=True)
                os._exit(0)
            torch.distributed.all_reduce(torch.ones(4), group=parallel.world.device_group)
    except (CollectiveTimeout, PeerFailed) as error:
        seen["die"] = f"{type(error).__name__}: {error}"
    return seen


def stuck_phase() -> None:
    """Sit in one phase past its deadline, in a call that nothing interrupts."""
    parallel = initialize(ParallelConfig(timeout_s=60))
    with collectives.deadline(parallel.world, "read corpus", seconds=1):
        time.sleep(30)
