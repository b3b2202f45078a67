"""Names that Megatron-Core imports; activation checkpoints are torch's."""

from contextlib import contextmanager

from torch.utils.checkpoint import checkpoint as _checkpoint


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
    return _checkpoint(function, *args, use_reentrant=False, **kwargs)
