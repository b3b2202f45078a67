"""What FP8 adds to a checkpoint, in plain tensors: scales of the delayed recipe, weights kept in FP8.

A checkpoint holds BF16 weights whatever trained them: those kept in FP8 are written as the numbers they stand for,
which is what the forward pass multiplied with, and quantised again when loaded. So a checkpoint of Transformer Engine's
layers loads into torch's and the other way round, and an export needs no GPU.

Transformer Engine would save its scales as a pickle and refuses to load that unless told that it is safe. Here they are
tensors in the place of Megatron's `_extra_state` objects; recipes without state, and BF16, have None there.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ra3_megatron.config.errors import UserError
from ra3_megatron.model.factory import unwrap
from ra3_megatron.model.fp8_health import delayed_states
from ra3_megatron.model.precision import is_quantised

log = logging.getLogger(__name__)

_EXTRA_STATE = re.compile(r"(.*)\._extra_state\d*")
"""Keys of Transformer Engine's state and the module's name in them; a group of experts has one per expert. A checkpoint
of torch layers has fewer of them."""

_STATES = (("scaling_fwd", "fwd"), ("scaling_bwd", "bwd"))
_WEIGHT = 1
"""Slot of a linear layer's weight among its forward tensors."""


def make_plain(entries: dict[str, Any], chunk: Any) -> None:
    """Replace, in a chunk's sharded state, what only Transformer Engine can read: FP8 weights and pickled scales.

    FP8 weights go through the host, one at a time: a second copy of the model would not fit beside it on the device.
    """
    module = unwrap(chunk)
    for name, entry in entries.items():
        data = getattr(entry, "data", None)
        if found := _EXTRA_STATE.fullmatch(name):
            entry.data = _scales(module.get_submodule(found[1]))
        elif isinstance(data, Tensor) and is_quantised(data):
            entry.data = data.detach().dequantize().cpu()


def _scales(module: Any) -> dict[str, Any] | None:
    """The delayed recipe's state of a module; None when it has none."""
    meta = getattr(module, "fp8_meta", {})
    found = {
        f"{what}_{way}": getattr(meta[key], what).detach().cpu()
        for key, way in _STATES
        if hasattr(meta.get(key), "amax_history")
        for what in ("scale", "amax_history")
    }
    return {**found, "num_gemms": int(meta["num_gemms"])} if found else None


def put_back(chunk: Any, values: dict[str, Any]) -> None:
    """Load a chunk's values, as `make_plain` left them, into its parameters and scales.

    Values of the checkpoint become the initial ones of an optimizer that is built later, for weights kept in FP8 too.
    Raises UserError when parameters are missing, or there are some that the model lacks.
    """
    module = unwrap(chunk)
    states = {found[1]: values.pop(name) for name in list(values) if (found := _EXTRA_STATE.fullmatch(name))}
    # Before the weights: those kept in FP8 are quantised with their scale.
    _restore_scales(module, states, values)
    kept = delayed_states([module])
    before = [t.clone() for t in kept]
    found = module.load_state_dict(values, strict=False)
    wrong = [n for n in (*found.missing_keys, *found.unexpected_keys) if not _EXTRA_STATE.fullmatch(n)]
    if wrong:
        raise UserError(f"the checkpoint and the model differ in {wrong[:4]}; it is a checkpoint of another model")
    # Quantising a weight leaves its largest value in the history of the delayed recipe.
    for tensor, value in zip(kept, before, strict=True):
        tensor.copy_(value)
    for name, parameter in module.named_parameters():
        if is_quantised(parameter) and name in values:
            _renew_initial_value(parameter, values[name])


def _renew_initial_value(parameter: Any, value: Tensor) -> None:
    """Megatron's optimizer makes master weights of the value that an FP8 weight was quantised from: the random one."""
    kept = getattr(parameter, "get_high_precision_init_val", lambda: None)()
    if kept is not None:
        kept.copy_(value)


def _restore_scales(root: Any, states: dict[str, Any], values: dict[str, Any]) -> None:
    """Scales of the delayed recipe from a checkpoint; without any, those of the weights that are loaded.

    At a scale of 1 most weights would be numbers below FP8's normal range, and a stage that only samples or measures
    never updates a scale.
    """
    config = root.config
    if config.fp8 is None or str(getattr(config.fp8_recipe, "value", config.fp8_recipe)) != "delayed":
        return
    from megatron.core.fp8_utils import get_fp8_recipe

    recipe, restored = get_fp8_recipe(config), 0
    for name, module in root.named_modules():
        weight, state = values.get(f"{name}.weight"), states.get(name)
        if not hasattr(module, "fp8_meta") or weight is None:
            continue
        meta = module.fp8_meta
        meta["num_gemms"], meta["recipe"] = state["num_gemms"] if isinstance(state, dict) else 1, recipe
        module.init_fp8_meta_tensors(recipe)
        if isinstance(state, dict):
            _restore(meta, state)
            restored += 1
        elif (amax := float(weight.detach().abs().max())) > 0:
            meta["scaling_fwd"].scale[_WEIGHT] = recipe.fp8_format.value[0] / amax
    if not restored:
        log.info("the checkpoint holds no scales of the delayed recipe; they start from its weights")


def _restore(meta: dict[str, Any], state: dict[str, Any]) -> None:
    for key, way in _STATES:
        meta[key].scale.copy_(state[f"scale_{way}"])
        history, saved = meta[key].amax_history, state[f"amax_history_{way}"]
        # Row 0 is being filled, the latest finished one stands last; a shorter history forgets the oldest.
        history.zero_()
        history[0].copy_(saved[0])
        if rows := min(len(history), len(saved)) - 1:
            history[-rows:].copy_(saved[-rows:])


def _quantised(chunks: Sequence[Any]) -> Iterator[Tensor]:
    return (p for chunk in chunks for p in chunk.parameters() if is_quantised(p))


def keeps_fp8_weights(chunks: Sequence[Any]) -> bool:
    """Whether any parameter is kept in FP8."""
    return any(True for _ in _quantised(chunks))


@torch.no_grad()
def requantise(chunks: Sequence[Any], optimizer: Any) -> None:
    """Collective, after the optimizer was loaded: make weights kept in FP8 of its master weights, as a step does.

    Of the checkpoint's BF16 numbers they would come out a rounding off, and a resumed run would differ from one that
    never stopped.
    """
    if optimizer is None or not keeps_fp8_weights(chunks):
        return
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        # Megatron has no public name for this part of its step.
        inner._copy_main_params_to_model_params()
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)
