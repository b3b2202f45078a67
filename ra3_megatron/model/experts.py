"""Mixtures of experts: Megatron-Core's MoE layer, its settings, and where experts and other parameters differ."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    _initialize_affine_weight_cpu,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.parallel.groups import ParallelSizes


def moe_settings(arch: Architecture, sizes: ParallelSizes, use_te: bool, on_gpu: bool) -> dict[str, Any]:
    """What TransformerConfig needs to know of the experts of `arch`; nothing for a dense model.

    The router computes in fp32, as Hugging Face's softmax does: a rounded logit sends a token to another expert. No
    token is ever dropped, so a log-probability depends on the sequence alone. There is no load-balancing loss: those of
    Megatron-Core are means over a micro-batch, or over as much of a global batch as was seen, so that the gradient
    would depend on how a batch is split.
    """
    if not arch.num_experts:
        return {}
    return {
        "num_moe_experts": arch.num_experts,
        "moe_router_topk": arch.experts_per_token,
        "moe_ffn_hidden_size": arch.expert_ffn_hidden_size,
        # Softmax over all experts, or over those chosen, which is the same as making their weights sum to 1.
        "moe_router_pre_softmax": not arch.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": use_te,
        "moe_permute_fusion": use_te and on_gpu,
        "expert_model_parallel_size": sizes.expert,
        "expert_tensor_parallel_size": sizes.expert_tensor or sizes.tensor,
    }


def local_experts() -> Any:
    """The MLP of a layer on torch alone: one expert after the other, keys as those of Transformer Engine's groups."""
    experts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return partial(MoELayer, submodules=MoESubmodules(experts=partial(SequentialMLP, submodules=experts)))


def moe_layers(chunk: Any) -> Iterator[MoELayer]:
    """The mixtures of a bare GPTModel chunk."""
    for layer in chunk.decoder.layers:
        if isinstance(layer.mlp, MoELayer):
            yield layer.mlp


def prepare_experts(chunk: Any, config: TransformerConfig) -> None:
    """Finish the experts of a newly built chunk.

    They always belong to the groups of experts, also where these equal all other parameters' (one process per expert
    group): so every layout has two optimizers, and loads every other's checkpoint. On a CPU the weights are drawn anew,
    expert by expert: Megatron draws them from the generator that all processes share, which gives each process the
    same experts (on a GPU it has one per process).
    """
    for moe in moe_layers(chunk):
        for parameter in moe.experts.parameters():
            parameter.allreduce = False
        # Transformer Engine's groups need a GPU, and are not initialised here.
        if config.use_cpu_initialization and isinstance(moe.experts, SequentialMLP):
            _draw(moe, config)


def _draw(moe: MoELayer, config: TransformerConfig) -> None:
    """Weights of every expert from a seed of its own, whole first: the same in every expert-parallel layout."""
    seed = int(torch.randint(2**62, ()))
    group = moe.experts.tp_group
    where: dict[str, Any] = {"rank": group.rank(), "world_size": group.size(), "params_dtype": config.params_dtype}
    where["skip_set_tensor_parallel_attributes"] = True  # they are set already
    for number, expert in zip(moe.local_expert_indices, moe.experts.local_experts, strict=True):
        fc1, fc2 = expert.linear_fc1, expert.linear_fc2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + number)
            _initialize_affine_weight_cpu(
                fc1.weight, fc1.output_size, fc1.input_size, fc1.output_size_per_partition, 0, config.init_method,
                stride=2, **where,
            )  # fmt: skip
            _initialize_affine_weight_cpu(
                fc2.weight, fc2.output_size, fc2.input_size, fc2.input_size_per_partition, 1,
                config.output_layer_init_method, **where,
            )  # fmt: skip
