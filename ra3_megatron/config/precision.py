"""What FP8, recompute and offload demand of one another and of the sizes: checked before anything is built."""

from dataclasses import dataclass
from typing import Protocol

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.sections import ModelConfig

FP8_FORMATS = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
"""Recipe → what `model.fp8_format` auto means."""

FP8_MULTIPLES = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32, "nvfp4": 32}
"""Recipe → what both sides of every matrix product must be multiples of: 16 bytes for the matrix units, and for mxfp8
a whole block."""

RECOMPUTABLE = ("core_attn", "mlp", "moe")
"""Values of `model.recompute_modules`: `mlp` of dense layers, `moe` of layers with experts. Megatron's others would
change nothing in a dense layer: its norms are part of the linear layers behind them."""


class Shards(Protocol):
    """Parallel sizes that cut matrices and windows, from a configuration or in force."""

    @property
    def tensor(self) -> int: ...
    @property
    def pipeline(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def sequence(self) -> bool: ...
    @property
    def expert_tensor(self) -> int | None: ...


def check_precision(model: ModelConfig, p: Shards, a: Architecture) -> None:
    """Raise UserError for settings of precision and memory that do not go together or do not fit the model."""
    _check_memory(model, p, a)
    if model.precision != "fp8":
        unread = {"fp8_params": model.fp8_params, "bf16_layers_at_start": model.bf16_layers_at_start}
        unread["bf16_layers_at_end"] = model.bf16_layers_at_end
        found = [f"model.{name} is {value}" for name, value in unread.items() if value]
        if found:
            raise UserError(f"{found[0]} and model.precision is {model.precision}; set model.precision=fp8")
        return
    if model.layers == "local":
        raise UserError("model.precision fp8 with model.layers local; FP8 exists only in Transformer Engine's layers")
    _check_recipe(model, a)
    _check_bf16_layers(model, p, a)
    if model.fp8_amax_history < 1 or min(model.fp8_health_interval, model.fp8_probe_interval) < 0:
        raise UserError(
            f"model.fp8_amax_history {model.fp8_amax_history}, fp8_health_interval {model.fp8_health_interval}, "
            f"fp8_probe_interval {model.fp8_probe_interval}: need at least 1, 0 and 0"
        )
    if not model.fp8_probe_limit > 0:
        raise UserError(f"model.fp8_probe_limit is {model.fp8_probe_limit}; it is a relative difference above 0")
    for matrix in fp8_matrices(p, a):
        matrix.check(model.fp8_recipe)


def check_fp8_tokens(model: ModelConfig, p: Shards, tokens: int, spelled: str) -> None:
    """Raise UserError unless a process's share of `tokens` suits FP8; `spelled` names the settings that make them."""
    if model.precision != "fp8":
        return
    shards = p.context * (p.tensor if p.sequence else 1)
    multiple = FP8_MULTIPLES[model.fp8_recipe]
    if tokens % (multiple * shards):
        by = " / parallel.context" * (p.context > 1) + " / parallel.tensor (sequence-parallel)" * p.sequence
        raise UserError(
            f"{spelled}{by} gives {tokens / shards:g} tokens per process; FP8 recipe {model.fp8_recipe} needs a "
            f"multiple of {multiple}; use {-(-tokens // (multiple * shards)) * multiple * shards} tokens"
        )


def _check_memory(model: ModelConfig, p: Shards, a: Architecture) -> None:
    known = [name for name in RECOMPUTABLE if name != ("mlp" if a.num_experts else "moe")]
    if not model.recompute_modules or set(model.recompute_modules) - set(known):
        raise UserError(
            f"model.recompute_modules is {list(model.recompute_modules)}; this model has {', '.join(known)}: give one "
            "or more of these"
        )
    stage = a.num_layers // p.pipeline
    if model.recompute_layers is not None and not (model.recompute == "full" and 1 <= model.recompute_layers <= stage):
        raise UserError(
            f"model.recompute_layers is {model.recompute_layers} and model.recompute {model.recompute}; it needs "
            f"model.recompute=full and 1 to {stage} layers (those of a pipeline stage)"
        )
    if not model.offload_layers:
        return
    if not 0 < model.offload_layers < a.num_layers:
        raise UserError(
            f"model.offload_layers is {model.offload_layers}; the model has {a.num_layers} layers and the last stays: "
            f"use 0 to {a.num_layers - 1}"
        )
    if p.pipeline > 1 or model.recompute != "none" or model.layers == "local":
        raise UserError(
            f"model.offload_layers is {model.offload_layers} with parallel.pipeline {p.pipeline}, model.recompute "
            f"{model.recompute}, model.layers {model.layers}; it needs 1, none and not local"
        )


def _check_recipe(model: ModelConfig, a: Architecture) -> None:
    recipe = model.fp8_recipe
    if recipe == "delayed" and a.num_experts:
        raise UserError(
            f"model.fp8_recipe is delayed and the model has {a.num_experts} experts, whose scales would not be saved "
            "with the rest; use model.fp8_recipe=tensorwise or blockwise"
        )
    if model.fp8_params and recipe in ("mxfp8", "nvfp4"):
        raise UserError(
            f"model.fp8_params with model.fp8_recipe {recipe}; weights kept in that format are not supported here; "
            "set model.fp8_params=false"
        )
    if recipe == "nvfp4" and model.fp8_format != "auto":
        raise UserError(
            f"model.fp8_format is {model.fp8_format} and model.fp8_recipe nvfp4, which has one format; leave it out"
        )


def _check_bf16_layers(model: ModelConfig, p: Shards, a: Architecture) -> None:
    start, end = model.bf16_layers_at_start, model.bf16_layers_at_end
    spelled = f"model.bf16_layers_at_start is {start} and bf16_layers_at_end {end}"
    if not start and not end:
        return
    if model.fp8_recipe == "delayed":
        raise UserError(
            f"{spelled} with model.fp8_recipe delayed, whose scales are made for all layers at once; use tensorwise, "
            "or no layers in BF16"
        )
    stage = a.num_layers // p.pipeline
    if min(start, end) < 0 or max(start, end) > stage:
        raise UserError(f"{spelled}; each may be 0 to {stage}, the layers of a pipeline stage")
    if start + end >= a.num_layers:
        raise UserError(f"{spelled}; of {a.num_layers} layers none would be left in FP8; use model.precision=bf16")


@dataclass(frozen=True)
class Matrix:
    """One side of the matrix products of a layer, as a process has it."""

    setting: str
    """Setting that makes it."""
    size: int
    """Rows or columns on a process."""

    def check(self, recipe: str) -> None:
        """Raise UserError when the recipe cannot take it."""
        multiple = FP8_MULTIPLES[recipe]
        if self.size % multiple:
            raise UserError(
                f"{self.setting} gives matrices of {self.size} rows or columns per process; FP8 recipe {recipe} needs "
                f"a multiple of {multiple}; lower parallel.tensor, or use model.precision=bf16"
            )


def fp8_matrices(p: Shards, a: Architecture) -> list[Matrix]:
    """Sides of the matrices of a layer that FP8 products read."""
    heads = "model.architecture.num_heads x head_dim / parallel.tensor"
    both = "model.architecture.(num_heads + 2 x num_kv_heads) x head_dim / parallel.tensor"
    mlp = Matrix("model.architecture.ffn_hidden_size / parallel.tensor", a.ffn_hidden_size // p.tensor)
    if a.num_experts:
        share = "model.architecture.expert_ffn_hidden_size / parallel.expert_tensor"
        mlp = Matrix(share, a.expert_ffn_hidden_size // (p.expert_tensor or p.tensor))
    return [
        Matrix("model.architecture.hidden_size", a.hidden_size),
        Matrix(heads, a.num_heads * a.head_dim // p.tensor),
        Matrix(both, (a.num_heads + 2 * a.num_kv_heads) * a.head_dim // p.tensor),
        mlp,
    ]
