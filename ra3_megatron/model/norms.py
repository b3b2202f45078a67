"""RMSNorm that may be used under sequence parallelism."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, `[..., hidden_size]` in and out.

    Megatron-Core's torch norm refuses sequence parallelism, where each rank sees part of the tokens and the weight's
    gradient must be summed over the tensor-parallel group; the mark on the weight is what asks for that sum.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = new_norm_weight(config, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `x` over its last dimension and scale by the weight."""
        return rms_norm(x, self.weight, self.eps)


def new_norm_weight(config: TransformerConfig, hidden_size: int) -> torch.nn.Parameter:
    """A weight of ones, marked for the gradient sum that sequence parallelism needs."""
    device = None if config.use_cpu_initialization else torch.cuda.current_device()
    weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension; the mean is taken in fp32 whatever the type of `x`."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)
