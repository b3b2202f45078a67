"""Fusions that are switched on after the model was built, where what they need is there."""

import logging
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from ra3_megatron.model.optional import fused_weight_gradients

log = logging.getLogger(__name__)


def fuse_weight_gradients(chunk: torch.nn.Module) -> None:
    """Let linear layers add a weight's gradient straight into its fp32 buffer: no BF16 copy, no further pass over it.

    Call once the buffers are there (`main_grad`, of DistributedDataParallel). Transformer Engine's layers can by
    themselves, Megatron-Core's own (the output layer, and all of the torch layers) with NVIDIA's apex alone.
    `TransformerConfig.gradient_accumulation_fusion` asks for both or none and raises without apex.
    """
    apex, fused = fused_weight_gradients().usable, 0
    module: Any
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
        elif apex and isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.gradient_accumulation_fusion = True
        else:
            continue
        fused += 1
    if fused:
        log.info("gradients of %d linear layers are added in the matrix product that makes them", fused)
