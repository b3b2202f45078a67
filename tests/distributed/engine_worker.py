"""Ranks of the layout-invariance tests: one global batch through the engine in many layouts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ra3_megatron.algo.decision import TokenSets
from ra3_megatron.algo.losses import PolicyLossConfig
from ra3_megatron.checkpoint.capture import synchronise_parameters
from ra3_megatron.checkpoint.distributed import load_sharded, save_sharded
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.run import config_from_dict
from ra3_megatron.data.batch import TrainBatch
from ra3_megatron.model.factory import build_model, unwrap
from ra3_megatron.parallel.groups import initialize, seed_everything
from ra3_megatron.rollout.scoring import score_labels
from ra3_megatron.training.actions import ActionTable
from ra3_megatron.training.components import (
    code_cross_entropy_component,
    cross_entropy_component,
    decision_kl_component,
    policy_gradient_component,
    reference_kl_component,
)
from ra3_megatron.training.engine import TrainEngine

SEQ, WINDOWS = 64, 8
THINK_SETS = [[3], [2, 40, 60, 100], list(range(30, 70))]
FORBIDDEN = [0, 5, 51, 52, 99]


def architecture(kind: str) -> Architecture:
    # 4 layers for interleaved pipelines; a vocabulary that needs padding at every tensor-parallel size.
    if kind == "experts":
        return Architecture(
            "qwen3_moe", 4, 48, 4, 2, 12, 96, 101, False, False, True, rope_base=1e4, max_positions=256,
            num_experts=8, experts_per_token=3, expert_ffn_hidden_size=20, norm_topk_prob=True,
        )  # fmt: skip
    return Architecture("qwen2", 4, 48, 4, 2, 12, 96, 101, kind == "tied", True, rope_base=1e4, max_positions=256)


def window(index: int) -> dict[str, Any]:
    """One window: sequences of multiples of 4 tokens, padding at the end, uneven masks."""
    g = torch.Generator().manual_seed(index)
    lengths, used = [], 0
    while SEQ - used > 8 and len(lengths) < 5:
        length = 4 * int(torch.randint(1, 1 + (SEQ - used) // 4, (), generator=g))
        lengths.append(length)
        used += length
    if used < SEQ:
        lengths.append(SEQ - used)
    ids = torch.randint(101, (SEQ,), generator=g)
    weight = (torch.rand(SEQ, generator=g) < 0.1 + 0.1 * index).float()
    weight[used:] = 0.0
    # Windows 4..7 are those of the second replica under DP2: it has no valid cross-entropy token at all.
    ce = weight if index < 4 else torch.zeros(SEQ)
    pg = (torch.rand(SEQ, generator=g) < 0.3).float() * (torch.arange(SEQ) < used)
    noise = torch.randn(3, SEQ, generator=g)
    labels = torch.randint(101, (SEQ,), generator=g)
    # A third of the actions each: decisions to go on, deciding tokens, later tokens of thoughts.
    kind = torch.randint(3, (SEQ,), generator=g)
    think_set = torch.where(kind < 2, torch.randint(1, 1 + len(THINK_SETS), (SEQ,), generator=g), 0) * pg
    labels[(kind == 2) & torch.isin(labels, torch.tensor(FORBIDDEN))] = 1
    return {
        "lengths": lengths,
        "ids": ids,
        "labels": labels,
        "weights": {
            "cross_entropy": ce,
            "code_cross_entropy": weight,
            "policy_gradient": pg,
            "reference_kl": pg,
            # A budget of tokens per sequence on a row that no component counts.
            "budget": 40.0 * (torch.arange(SEQ) == SEQ - 1),
        },
        "extras": {
            "think_set": think_set,
            "thought": (kind > 0) * pg,
            "behaviour_log_probs": torch.where(kind > 0, -4.6, -0.2) + 0.2 * noise[0],
            "advantages": noise[1],
            "reference_log_probs": -4.6 + 0.3 * noise[2],
        },
    }


def micro_batch(indices: list[int]) -> TrainBatch:
    windows = [window(i) for i in indices]
    lengths = [n for w in windows for n in w["lengths"]]
    return TrainBatch(
        input_ids=torch.cat([w["ids"] for w in windows]),
        labels=torch.cat([w["labels"] for w in windows]),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        max_seqlen=max(lengths),
        weights={k: torch.cat([w["weights"][k] for w in windows]) for k in windows[0]["weights"]},
        extras={k: torch.cat([w["extras"][k] for w in windows]) for k in windows[0]["extras"]},
    )


def run(layouts: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """For every layout: losses, gradient norm; all gradients and all weights after the update go to `folder`."""
    return [run_one(dict(layout), Path(folder)) for layout in layouts]


def run_one(layout: dict[str, Any], folder: Path) -> dict[str, Any]:
    kind = layout.pop("kind")
    name, micro = layout.pop("name"), layout.pop("micro_batch_size", 1)
    recompute = layout.pop("recompute", "none")
    arch = architecture(kind)
    config = config_from_dict(
        {
            "parallel": {**layout, "timeout_s": 60},
            "train": {"steps": 3, "seq_length": SEQ, "micro_batch_size": micro, "global_batch_size": WINDOWS},
            "model": {"vocab_multiple": 8, "recompute": recompute},
            # A large epsilon: Adam divides by the root of tiny second moments otherwise, which amplifies rounding.
            "optimizer": {"lr": 1e-2, "eps": 0.1},
        }
    )
    with initialize(config.parallel) as parallel:
        seed_everything(1, parallel)
        chunks = build_model(arch, config.model, parallel)
        start = folder / f"start-{kind}"
        if name == "one":
            save_sharded(start, sharded(chunks), parallel)
        else:
            values = load_sharded(start, sharded(chunks), parallel)
            for i, chunk in enumerate(chunks):
                chunk.load_state_dict(values[f"chunk{i}"])
        components = [
            cross_entropy_component(),
            policy_gradient_component(PolicyLossConfig(), 0.7),
            decision_kl_component(0.8, 0.4),
            reference_kl_component(0.3),
            code_cross_entropy_component(),
            replace(
                policy_gradient_component(PolicyLossConfig(clip_high=0.3), 0.5, reads="labels"),
                name="label_gradient", weights="reference_kl", normaliser="budget", sums=(), maxima=(),
            ),
        ]  # fmt: skip
        actions = ActionTable(TokenSets.make(THINK_SETS), torch.tensor(FORBIDDEN), temperature=0.8)
        engine = TrainEngine(config, arch, parallel, chunks, components, 3, actions, label_temperature=0.7)
        share = WINDOWS // parallel.sizes.data
        mine = list(range(parallel.data_rank * share, (parallel.data_rank + 1) * share))
        batches = [micro_batch(mine[i : i + micro]) for i in range(0, len(mine), micro)]
        scores = torch.cat(score_labels(engine.chunks, arch, parallel, batches, 0.7)).view(len(mine), SEQ)
        evaluated = engine.evaluate(batches)
        result = engine.train_step(batches, step=1)
        save_sharded(folder / f"grads-{name}-{kind}", gradients(engine), parallel)
        second = engine.train_step(batches, step=2)
        synchronise_parameters(engine.chunks)
        save_sharded(folder / f"weights-{name}-{kind}", sharded([unwrap(c) for c in engine.chunks]), parallel)
        return {
            "name": name,
            "scores": {str(i): row.tolist() for i, row in zip(mine, scores, strict=True)},
            "evaluated": evaluated.loss,
            "loss": result.loss,
            "components": result.components,
            "weights": result.weights,
            "monitors": result.monitors,
            "grad_norm": result.grad_norm,
            "second": second.loss,
        }


def sharded(chunks: list[Any]) -> dict[str, Any]:
    return {f"chunk{i}": unwrap(chunk).sharded_state_dict() for i, chunk in enumerate(chunks)}


def gradients(engine: TrainEngine) -> dict[str, Any]:
    """The model's sharded state dict with gradients in place of weights.

    The distributed optimizer leaves each replica its share of the reduced gradient: gather them first. Clipping has
    scaled them by the same factor in every layout.
    """
    groups = engine.parallel.pg_collection
    for chunk in engine.chunks:
        shared = [(buffer, groups.dp_cp) for buffer in chunk.buffers]
        shared += [(buffer, groups.expt_dp) for buffer in chunk.expert_parallel_buffers]
        for buffer, group in shared:
            for bucket in buffer.buckets:
                share = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, share, group=group)
    out = {}
    for i, chunk in enumerate(engine.chunks):
        model = unwrap(chunk)
        state = model.sharded_state_dict()
        by_pointer = {p.data_ptr(): p for p in model.parameters()}
        out[f"chunk{i}"] = replace_data(state, by_pointer)
    return out


def replace_data(state: dict[str, Any], by_pointer: dict[int, Any]) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    found = {}
    for key, entry in state.items():
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and entry.data is not None:
            parameter = by_pointer.get(entry.data.data_ptr())
            if parameter is not None:
                entry.data = parameter.main_grad.view_as(parameter)
                found[key] = entry
    return found
