"""From an architecture and settings to Megatron-Core model chunks on this rank."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.precision import check_precision
from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.config.validate import check_model_split, padded_vocab_size
from ra3_megatron.model.experts import moe_settings, prepare_experts
from ra3_megatron.model.optional import check_apex, have_te, require_te
from ra3_megatron.model.precision import (
    check_chip,
    precision_options,
    refuse_silent_bf16,
    set_deterministic,
)
from ra3_megatron.model.rope import PackedRotaryEmbedding
from ra3_megatron.model.spec import block_spec
from ra3_megatron.parallel.groups import Parallel, ParallelSizes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerChoice:
    """Which layer implementation is built, and why."""

    use_te: bool
    """Transformer Engine's layers rather than torch's."""
    reason: str
    """One line for the log."""


def choose_layers(model: ModelConfig) -> LayerChoice:
    """Decide between Transformer Engine and torch; raises UserError rather than quietly giving less than was asked.

    FP8 without Transformer Engine would train in BF16 with no word: Megatron-Core returns an empty context.
    """
    check_apex()
    if model.precision == "fp8":
        if model.layers == "local":
            raise UserError(
                "model.precision fp8 with model.layers local; FP8 exists only in Transformer Engine's layers"
            )
        require_te("model.precision fp8")
        check_chip(model)
        return LayerChoice(True, f"Transformer Engine layers, FP8 recipe {model.fp8_recipe}")
    if model.layers == "te" or model.offload_layers:
        require_te("model.layers te" if model.layers == "te" else f"model.offload_layers {model.offload_layers}")
        return LayerChoice(True, "Transformer Engine layers, as asked")
    if model.layers == "auto" and model.precision != "fp32" and have_te():
        return LayerChoice(True, "Transformer Engine layers (found on this machine)")
    if model.layers == "local":
        return LayerChoice(False, "torch layers (as asked)")
    # Transformer Engine has no fused attention in fp32 and would keep the scores of every window; torch has one.
    why = "fp32; Transformer Engine's fused attention has none" if have_te() else "no usable Transformer Engine here"
    return LayerChoice(False, f"torch layers ({why})")


def _recompute(model: ModelConfig) -> dict[str, Any]:
    if model.recompute == "none":
        return {}
    if model.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(model.recompute_modules)}
    if model.recompute_layers is None:
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": model.recompute_layers,
    }


def build_transformer_config(
    arch: Architecture, model: ModelConfig, sizes: ParallelSizes, use_te: bool, on_gpu: bool
) -> TransformerConfig:
    """Megatron-Core's configuration of `arch`.

    Fusions that exist only as CUDA or Transformer Engine kernels are off elsewhere. Dropout is off; with torch layers
    on a CPU every operation is deterministic, so that a resumed run equals an uninterrupted one bit for bit (attention
    kernels on a GPU add in no fixed order). Loss functions return sums and token counts (`calculate_per_token_loss`).
    Raises UserError when the sizes do not divide the model or FP8 cannot take its matrices.
    """
    check_model_split(sizes, arch)
    check_precision(model, sizes, arch)
    interleaved = sizes.virtual_pipeline is not None
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.ffn_hidden_size,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        init_method_std=model.init_std,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual_pipeline,
        context_parallel_size=sizes.context,
        sequence_parallel=sizes.sequence,
        # Interleaved stages on two processes mix messages up unless sends and receives overlap one by one.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # Synchronises the device after every send; only needed by torch before 1.10.
        batch_p2p_sync=False,
        # Micro-batches may be windows of different lengths; Megatron allows that with this dispatcher only, also in
        # models without experts.
        variable_seq_lengths=sizes.pipeline > 1,
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,
        deterministic_mode=not use_te or model.deterministic,
        use_cpu_initialization=not on_gpu,
        transformer_impl="transformer_engine" if use_te else "local",
        bias_activation_fusion=use_te,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=use_te,
        persist_layer_norm=use_te,
        # Switched on layer by layer once there are fp32 gradient buffers (`fuse_weight_gradients`).
        gradient_accumulation_fusion=False,
        cross_entropy_loss_fusion=False,
        # No CUDA graphs; Megatron's default names a mode it then warns about.
        cuda_graph_modules=[],
        **moe_settings(arch, sizes, use_te, on_gpu),
        cpu_offloading=model.offload_layers > 0,
        cpu_offloading_num_layers=model.offload_layers,
        **precision_options(model),
        **_recompute(model),
    )


@contextmanager
def _without_deprecation_line() -> Iterator[None]:
    """Hide the one line in which GPTModel announces its successor; why it is used stands in `build_model`."""
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")

    def keep(record: logging.LogRecord) -> bool:
        return "GPTModel IS DEPRECATED" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def build_model(arch: Architecture, model: ModelConfig, parallel: Parallel) -> list[torch.nn.Module]:
    """This rank's model chunks, one per virtual pipeline stage, on the device, in the precision's dtype.

    A chunk maps `input_ids`, `position_ids` [batch, seq] (packed windows: batch 1 with `packed_seq_params`) to logits
    [batch, seq, padded vocabulary / tp], or to hidden states before the last stage. BF16 and FP8 chunks are wrapped
    in Megatron's Float16Module. Weights are random; the seed is `seed_everything`'s. Raises Fp8NotInUse when what was
    built is not the FP8 that was asked for.

    GPTModel it is, although 0.19 announces HybridModel as its successor. HybridModel counts attention and MLP as layers
    of their own ("*-" per transformer layer), so checkpoint keys and pipeline splits differ from every mapping there
    is (ours, Megatron-Bridge's); its only layer spec needs Transformer Engine; and it builds its rotary embedding
    without Llama 3's scaling. This factory is the only place that names the class.
    """
    choice = choose_layers(model)
    log.info("%s", choice.reason)
    if model.deterministic and parallel.on_gpu:
        set_deterministic(choice.use_te)
    return build_chunks(arch, model, parallel, choice.use_te)


def build_chunks(arch: Architecture, model: ModelConfig, parallel: Parallel, use_te: bool) -> list[torch.nn.Module]:
    """The chunks of `build_model` with layers of Transformer Engine or of torch."""
    config = build_transformer_config(arch, model, parallel.sizes, use_te, parallel.on_gpu)
    stages: list[int | None] = [None]
    if parallel.sizes.virtual_pipeline is not None:
        stages = list(range(parallel.sizes.virtual_pipeline))
    chunks = [_build_chunk(arch, model, parallel, config, use_te, stage) for stage in stages]
    refuse_silent_bf16(chunks, model)
    return chunks


def _build_chunk(
    arch: Architecture,
    model: ModelConfig,
    parallel: Parallel,
    config: TransformerConfig,
    use_te: bool,
    vp_stage: int | None,
) -> torch.nn.Module:
    first = parallel.is_first_stage and vp_stage in (None, 0)
    last = parallel.is_last_stage and vp_stage in (None, (parallel.sizes.virtual_pipeline or 1) - 1)
    with _without_deprecation_line():
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=block_spec(config, use_te, vp_stage, parallel.pipeline_rank),
            vocab_size=padded_vocab_size(arch.vocab_size, model.vocab_multiple, parallel.sizes.tensor),
            max_sequence_length=arch.max_positions,
            pre_process=first,
            post_process=last,
            parallel_output=True,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=arch.rope_base,
            pg_collection=parallel.pg_collection,
            vp_stage=vp_stage,
        )
    # Plugged in, not patched: the attribute is Megatron's seam for the embedding's class.
    chunk.rotary_pos_emb = PackedRotaryEmbedding(
        arch, config.use_cpu_initialization, parallel.pg_collection.cp, fused=config.apply_rope_fusion
    )
    prepare_experts(chunk, config)
    chunk.to(parallel.device)
    return chunk if model.precision == "fp32" else Float16Module(config, chunk)


def unwrap(chunk: Any) -> Any:
    """The GPTModel inside its wrappers (DistributedDataParallel, Float16Module)."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
