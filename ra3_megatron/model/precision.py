"""FP8 through Transformer Engine: Megatron-Core's options of each recipe, the chips that can run them, and what runs.

That FP8 was asked for proves nothing: Megatron-Core returns an empty context where it finds no Transformer Engine, and
a layer of another specification ignores it. `describe_layers` reads the modules that were built, `require_fp8` the
state that Transformer Engine leaves in them in a forward pass.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.precision import FP8_FORMATS
from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.parallel.collectives import gather_objects
from ra3_megatron.parallel.groups import Parallel

DETERMINISTIC = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""What Transformer Engine and cuBLAS read for `model.deterministic`."""


class Fp8NotInUse(RuntimeError):
    """FP8 was asked for and no module computes in it."""


def precision_options(model: ModelConfig) -> dict[str, Any]:
    """Megatron-Core's options for `model.precision` and the FP8 recipe."""
    if model.precision == "fp32":
        return {"params_dtype": torch.float32, "pipeline_dtype": torch.float32}
    options: dict[str, Any] = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    if model.precision == "bf16":
        return options
    if model.fp8_recipe == "nvfp4":
        # Four bits are a mode of their own in Megatron-Core.
        options |= {"fp4": "e2m1", "fp4_recipe": "nvfp4"}
    else:
        chosen = FP8_FORMATS[model.fp8_recipe] if model.fp8_format == "auto" else model.fp8_format
        options |= {"fp8": chosen, "fp8_recipe": model.fp8_recipe, "fp8_param": model.fp8_params}
    if model.fp8_recipe == "delayed":
        options |= {"fp8_amax_history_len": model.fp8_amax_history, "fp8_amax_compute_algo": model.fp8_amax_algo}
    if model.bf16_layers_at_start or model.bf16_layers_at_end:
        options |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": model.bf16_layers_at_start,
            "num_layers_at_end_in_bf16": model.bf16_layers_at_end,
        }
    return options


def check_chip(model: ModelConfig) -> None:
    """Raise UserError when this GPU cannot run the recipe, in Transformer Engine's own words why."""
    import transformer_engine.pytorch as te

    checks = {
        "delayed": te.is_fp8_available,
        "tensorwise": te.is_fp8_available,
        "blockwise": te.is_fp8_block_scaling_available,
        "mxfp8": te.is_mxfp8_available,
        "nvfp4": te.is_nvfp4_available,
    }
    able, reason = checks[model.fp8_recipe](return_reason=True)
    if not able:
        fitting = [name for name, check in checks.items() if check()]
        cure = f"use model.fp8_recipe={' or '.join(fitting)}" if fitting else "use model.precision=bf16"
        major, minor = torch.cuda.get_device_capability()
        raise UserError(
            f"model.fp8_recipe {model.fp8_recipe} on {torch.cuda.get_device_name()} (compute capability "
            f"{major}.{minor}): {reason.rstrip('.')}; {cure}"
        )


def set_deterministic(use_te: bool) -> None:
    """Have torch, cuBLAS and Transformer Engine add in a fixed order, before any layer is built.

    Operations that have no such variant (a cumulative sum while sampling) only warn: none is part of a training step.
    Raises UserError when the environment says the opposite.
    """
    for name, value in DETERMINISTIC.items():
        if use_te or name.startswith("CUBLAS"):
            found = os.environ.setdefault(name, value)
            if found != value and name.startswith("NVTE"):
                raise UserError(f"model.deterministic with {name}={found} in the environment; unset it or set it to 0")
    torch.use_deterministic_algorithms(True, warn_only=True)


@contextmanager
def in_bf16(config: TransformerConfig) -> Iterator[None]:
    """Forward passes of the model that `config` belongs to run in BF16 inside the block, on the same weights.

    Megatron-Core reads the two fields in every forward pass. Weights kept in FP8 are read as the BF16 numbers they
    stand for.
    """
    fp8, fp4 = config.fp8, config.fp4
    config.fp8, config.fp4 = None, None
    try:
        yield
    finally:
        config.fp8, config.fp4 = fp8, fp4


def renew_quantised_weights(chunks: Sequence[Any]) -> None:
    """Call after weights changed: Transformer Engine's layers then make their FP8 copies anew in the next forward pass.

    Megatron-Core's schedule asks for it at the first micro-batch of a step; a rollout calls the model itself and would
    go on with the copies of the step before.
    """
    for chunk in chunks:
        if hasattr(chunk, "set_is_first_microbatch"):
            chunk.set_is_first_microbatch()


# ---------------------------------------------------------------- what was built


@dataclass(frozen=True)
class LayerFacts:
    """One transformer layer as it was built."""

    number: int
    """From 1, over all pipeline stages."""
    linears: tuple[str, ...]
    """Classes of the linear layers, in order."""
    attention: str
    """Class of the core attention."""
    numbers: str
    """`fp32`, `BF16`, or the FP8 recipe that its forward pass enters."""
    weights: str
    """`FP8` when the weights of the linear layers are kept in FP8, else their type."""


def _weight(module: Any) -> Any:
    """Weight of a linear layer, or the first expert's of a group of them; none of another module."""
    return getattr(module, "weight", getattr(module, "weight0", None))


def _layers(chunks: Sequence[Any]) -> Iterator[Any]:
    from megatron.core.transformer.transformer_layer import TransformerLayer

    for chunk in chunks:
        yield from (m for m in chunk.modules() if isinstance(m, TransformerLayer))


def is_quantised(tensor: Any) -> bool:
    """Whether a parameter is one of Transformer Engine's tensors with FP8 data."""
    from megatron.core.fp8_utils import is_float8tensor

    return bool(is_float8tensor(tensor))


def _numbers(config: TransformerConfig, number: int) -> str:
    """What the forward pass of layer `number` enters, asked where Megatron-Core's block asks."""
    from megatron.core.fp4_utils import get_fp4_recipe
    from megatron.core.fp8_utils import get_fp8_recipe, is_first_last_bf16_layer

    if (config.fp8 or config.fp4) and not is_first_last_bf16_layer(config, number - 1):
        recipe = get_fp8_recipe(config) if config.fp8 else get_fp4_recipe(config)
        if recipe is None:
            return "BF16"  # what Megatron-Core does without Transformer Engine
        format_ = getattr(recipe, "fp4_format" if config.fp4 else "fp8_format").name
        return f"{type(recipe).__name__.removeprefix('TE')} {format_}"
    return {torch.float32: "fp32", torch.bfloat16: "BF16"}.get(config.params_dtype, str(config.params_dtype))


def layer_facts(chunks: Sequence[Any]) -> list[LayerFacts]:
    """Every transformer layer of this process, as built."""
    facts = []
    for layer in _layers(chunks):
        linears = [m for n, m in layer.named_modules() if "linear" in n and _weight(m) is not None]
        attention = getattr(layer.self_attention, "core_attention", None)
        quantised = {is_quantised(_weight(m)) for m in linears}
        kinds = {str(_weight(m).dtype).removeprefix("torch.") for m in linears}
        facts.append(
            LayerFacts(
                number=layer.layer_number,
                linears=tuple(type(m).__name__ for m in linears),
                attention=type(attention).__name__,
                numbers=_numbers(layer.config, layer.layer_number),
                weights="FP8" if quantised == {True} else "/".join(sorted(kinds)),
            )
        )
    return facts


def describe_layers(facts: Sequence[LayerFacts]) -> list[str]:
    """One line per run of equal layers, for the start-up log."""
    lines = []
    for _, run in groupby(facts, key=lambda f: (f.linears, f.attention, f.numbers, f.weights)):
        first, *rest = list(run)
        span = f"{first.number}-{rest[-1].number}" if rest else f"{first.number}"
        classes = ", ".join(dict.fromkeys((*first.linears, first.attention)))
        lines.append(f"layers {span}: {first.numbers}, weights {first.weights}; {classes}")
    return lines


def layers_in_use(chunks: Sequence[Any], parallel: Parallel) -> list[str]:
    """Collective over the pipeline: `describe_layers` of the whole model."""
    parts = gather_objects(parallel.group("pp"), layer_facts(chunks), "layers that were built")
    return describe_layers(sorted((f for part in parts for f in part), key=lambda f: f.number))


def refuse_silent_bf16(chunks: Sequence[Any], model: ModelConfig) -> None:
    """Raise Fp8NotInUse when a layer was built that would not compute in the FP8 asked for, or not keep its weights so.

    A pipeline stage whose layers all stay in BF16 by `bf16_layers_at_start` or `_at_end` is right.
    """
    if model.precision != "fp8":
        return
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    facts = layer_facts(chunks)
    config = next((layer.config for layer in _layers(chunks)), None)
    meant = [f for f in facts if config is not None and not is_first_last_bf16_layer(config, f.number - 1)]
    other = [f for f in meant if f.numbers == "BF16" or not all(name.startswith("TE") for name in f.linears)]
    if other:
        raise Fp8NotInUse(
            f"model.precision is fp8, but layer {other[0].number} was built to compute in {other[0].numbers} with "
            f"{', '.join(other[0].linears)}"
        )
    kept = [f for f in meant if f.weights != "FP8"]
    if model.fp8_params and kept:
        raise Fp8NotInUse(
            f"model.fp8_params is true, but layer {kept[0].number} keeps its weights in {kept[0].weights}"
        )


def fp8_modules(chunks: Sequence[Any]) -> list[tuple[str, Any]]:
    """Names and modules of Transformer Engine's linear layers in this process's transformer layers.

    A name begins with the layer's number over all pipeline stages, such as `3.mlp.linear_fc1`.
    """
    return [
        (f"{layer.layer_number}.{name}", module)
        for layer in _layers(chunks)
        for name, module in layer.named_modules()
        if hasattr(module, "fp8_meta") and _weight(module) is not None
    ]


def require_fp8(chunks: Sequence[Any], model: ModelConfig) -> str:
    """After a forward pass: one line on which modules ran in FP8 and with which recipe; "" when FP8 was not asked for.

    Raises Fp8NotInUse when Transformer Engine's own state says that a layer which should, did not.
    """
    if model.precision != "fp8":
        return ""
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    meant = {
        layer.layer_number: not is_first_last_bf16_layer(layer.config, layer.layer_number - 1)
        for layer in _layers(chunks)
    }
    ran: dict[str, list[str]] = {}
    for place, module in fp8_modules(chunks):
        did = bool(module.fp8_initialized)
        if did != meant[int(place.partition(".")[0])]:
            raise Fp8NotInUse(
                f"after a forward pass {place} ({type(module).__name__}) {'ran' if did else 'did not run'} in FP8; "
                f"model.fp8_recipe is {model.fp8_recipe}"
            )
        if did:
            ran.setdefault(type(module.fp8_meta["recipe"]).__name__.removeprefix("TE"), []).append(place)
    if not ran and any(meant.values()):
        raise Fp8NotInUse(f"model.precision is fp8, but after a forward pass no module ran in it ({model.fp8_recipe})")
    return "; ".join(
        f"{len(places)} linear layers ran in FP8 with {recipe}, {places[0]} to {places[-1]}"
        for recipe, places in ran.items()
    )
