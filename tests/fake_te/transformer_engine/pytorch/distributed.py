"""Names that Megatron-Core imports; activation checkpoints are torch's."""

from contextlib import contextmanager

from torch.utils.checkpoint import checkpoint as _checkpoint
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager


class CudaRNGStatesTracker:
    """Base of Megatron-Core's tracker for CUDA graphs."""


@contextmanager
def activation_recompute_forward(activation_recompute=False, recompute_phase=False):
    yield


def is_fp8_activation_recompute_enabled() -> bool:
    return False


def checkpoint(
    function, *args, distribute_saved_activations=False, get_rng_state_tracker=None, tp_group=None, **kwargs
):
    """As the real one, the second pass runs with the recipe of the first, outside of its context as it is."""
    state = FP8GlobalStateManager.quantization_state
    then = state.fp8_enabled, state.fp8_recipe

    def again(*inputs, **named):
        now = state.fp8_enabled, state.fp8_recipe
        state.fp8_enabled, state.fp8_recipe = then
        try:
            return function(*inputs, **named)
        finally:
            state.fp8_enabled, state.fp8_recipe = now

    return _checkpoint(again, *args, use_reentrant=False, **kwargs)
