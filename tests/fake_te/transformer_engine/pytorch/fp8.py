"""The global FP8 state, its contexts, the state of the delayed recipe, and what a Hopper chip can run."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from transformer_engine.common.recipe import Float8CurrentScaling, Recipe

FORMATS = {448.0: torch.float8_e4m3fn, 57344.0: torch.float8_e5m2, 6.0: torch.float8_e4m3fn}


class FP8GlobalStateManager:
    """Which recipe is on, and the modules whose delayed scales are updated when it ends."""

    quantization_state = SimpleNamespace(fp8_enabled=False, fp8_recipe=None, fp8_parameters=False, autocast_depth=0)
    high_precision = False
    delayed: list[Any] = []  # noqa: RUF012

    @classmethod
    def reset(cls) -> None:
        cls.delayed.clear()

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.quantization_state.fp8_enabled

    @classmethod
    def get_fp8_recipe(cls) -> Recipe:
        return cls.quantization_state.fp8_recipe or Float8CurrentScaling()

    @classmethod
    def with_fp8_parameters(cls) -> bool:
        return cls.quantization_state.fp8_parameters

    @classmethod
    def update_delayed(cls) -> None:
        for module in cls.delayed:
            module.fp8_meta["scaling_fwd"].update(module.fp8_meta["recipe"], 448.0)


@contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False):
    state = FP8GlobalStateManager.quantization_state
    before = state.fp8_enabled, state.fp8_recipe
    state.fp8_enabled, state.fp8_recipe = enabled, fp8_recipe
    state.autocast_depth += 1
    try:
        yield
    finally:
        state.autocast_depth -= 1
        state.fp8_enabled, state.fp8_recipe = before
        if enabled and state.autocast_depth == 0 and torch.is_grad_enabled():
            FP8GlobalStateManager.update_delayed()


@contextmanager
def fp8_model_init(enabled=True, recipe=None, preserve_high_precision_init_val=False):
    state = FP8GlobalStateManager.quantization_state
    before = state.fp8_parameters, state.fp8_recipe, FP8GlobalStateManager.high_precision
    state.fp8_parameters, state.fp8_recipe = enabled, recipe
    FP8GlobalStateManager.high_precision = preserve_high_precision_init_val
    try:
        yield
    finally:
        state.fp8_parameters, state.fp8_recipe, FP8GlobalStateManager.high_precision = before


class DelayedState:
    """Scales and the history of largest values of a module's tensors, as the real recipe state has them."""

    def __init__(self, recipe: Recipe, count: int) -> None:
        self.scale = torch.ones(count)
        self.amax_history = torch.zeros(recipe.amax_history_len, count)

    def update(self, recipe: Recipe, largest: float) -> None:
        history = self.amax_history
        amax = history.amax(0) if recipe.amax_compute_algo == "max" else history[0].clone()
        history.copy_(history.roll(-1, 0))
        history[0] = 0
        fits = (amax > 0) & amax.isfinite()
        self.scale.copy_(torch.where(fits, largest / amax, self.scale))


def rounded(x: torch.Tensor, scale: torch.Tensor | float | None = None, largest: float = 448.0) -> torch.Tensor:
    """`x` [...] through FP8 and back, with its own scale unless one is given."""
    wide = x.detach().float()
    if scale is None:
        scale = largest / wide.abs().amax().clamp_min(1e-12)
    return ((wide * scale).clamp(-largest, largest).to(FORMATS[largest]).float() / scale).to(x.dtype)


def _hopper(able: bool, why: str):
    def check(return_reason=False):
        return (able, "" if able else why) if return_reason else able

    return check


is_fp8_available = _hopper(True, "")
is_fp8_block_scaling_available = _hopper(True, "")
is_mxfp8_available = _hopper(False, "Device compute capability 10.0 or higher required for MXFP8 execution.")
is_nvfp4_available = _hopper(False, "Device compute capability 10.0 or higher required for NVFP4 execution.")
