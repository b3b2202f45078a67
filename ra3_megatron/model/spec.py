"""Layer specifications: Transformer Engine's where it runs, torch's with the same parameter names elsewhere."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from ra3_megatron.model.attention import SDPACoreAttention
from ra3_megatron.model.experts import local_experts
from ra3_megatron.model.norms import RMSNorm, new_norm_weight, rms_norm


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm followed by a column-parallel linear layer, with Transformer Engine's parameter names.

    `layer_norm_weight` [input_size], `weight` [output_size / tp, input_size], `bias` [output_size / tp]. The names
    make checkpoints of the two specifications interchangeable. `stride` must reach the linear layer: without it,
    resharding cuts the two halves of SwiGLU's weight in the wrong places.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[torch.Tensor], None],
        gather_output: bool,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        skip_weight_param_allocation: bool = False,
        tp_comm_buffer_name: str | None = None,
        tp_group: Any = None,
        stride: int = 1,
        name: str | None = None,
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            config=config,
            init_method=init_method,
            bias=bias,
            gather_output=gather_output,
            stride=stride,
            skip_bias_add=skip_bias_add,
            skip_weight_param_allocation=skip_weight_param_allocation,
            is_expert=is_expert,
            tp_comm_buffer_name=tp_comm_buffer_name,
            tp_group=tp_group,
            name=name,
        )
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = new_norm_weight(config, input_size)

    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Normalise and project `[s, b, input_size]` to `[s, b, output_size / tp]`; returns (output, bias to add)."""
        return super().forward(rms_norm(input_, self.layer_norm_weight, self.eps), weight, runtime_gather_output)


def local_layer_spec(qk_norm: bool, experts: bool = False) -> ModuleSpec:
    """One transformer layer on torch alone, parameter names as in Transformer Engine's spec."""
    head_norm: Any = RMSNorm if qk_norm else IdentityOp
    dense = partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(linear_fc1=LayerNormColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=LayerNormColumnParallelLinear,
                    core_attention=SDPACoreAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            # The router needs the normalised tokens too: with experts the norm is a module of its own.
            pre_mlp_layernorm=RMSNorm if experts else IdentityOp,
            mlp=local_experts() if experts else dense,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(
    config: TransformerConfig, use_te: bool, vp_stage: int | None, pp_rank: int
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage (and virtual stage) with their final norm."""
    if use_te:
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = (
            get_gpt_layer_with_transformer_engine_spec(
                num_experts=config.num_moe_experts,
                moe_grouped_gemm=config.moe_grouped_gemm,
                qk_layernorm=config.qk_layernorm,
            ),
            TENorm,
        )
    else:
        layer, norm = local_layer_spec(config.qk_layernorm, config.num_moe_experts is not None), RMSNorm
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)
