"""What FP8 does to the numbers: largest values, scales, overflow and underflow per quarter of the layers.

Measured where the numbers are rounded: at the inputs, weights and output gradients of Transformer Engine's linear
layers, in one forward and backward pass, with hooks that are there for that pass alone. So all recipes are measured
alike, also those that keep no state (tensorwise, blockwise); the scales of the delayed recipe are its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.model.norms import rms_norm
from ra3_megatron.model.precision import fp8_modules, is_quantised

QUARTERS = 4
"""Groups of consecutive layers that figures are told apart by."""

KINDS = ("input", "weight", "gradient")
"""Tensors of a matrix product."""

_SMALLEST = {448.0: 2.0**-10, 57344.0: 2.0**-17}
"""Largest number of a format (E4M3, E5M2) → what rounds to zero: half of its smallest number."""

_SLOTS = {"input": ("scaling_fwd", 0), "weight": ("scaling_fwd", 1), "gradient": ("scaling_bwd", 0)}
"""Where the delayed recipe's state of a linear layer has the tensor."""


class Fp8Health:
    """Collects over one pass; `figures` joins all processes.

    Per quarter and kind the largest value and the smallest scale; over all of them the shares of values that
    overflowed (beyond the largest number at the scale in use) and that underflowed (not zero, and rounded to it), and
    how many were no finite numbers. Recipes with a scale per block have no scale here, and their shares are not known.
    """

    def __init__(self, chunks: Sequence[Any], model: ModelConfig, num_layers: int, device: torch.device) -> None:
        self._modules = fp8_modules(chunks)
        self._per_tensor = model.fp8_recipe in ("delayed", "tensorwise")
        self._num_layers = num_layers
        shape = (len(KINDS), QUARTERS)
        self._amax = torch.zeros(shape, dtype=torch.float64, device=device)
        self._scale = torch.full(shape, torch.inf, dtype=torch.float64, device=device)
        # Per kind: values, overflows, underflows, not finite.
        self._counts = torch.zeros(len(KINDS), 4, dtype=torch.float64, device=device)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure the passes inside the block; nothing about them changes."""
        handles = [module.register_forward_hook(self._hook(self._quarter(name))) for name, module in self._modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _quarter(self, name: str) -> int:
        return (int(name.partition(".")[0]) - 1) * QUARTERS // self._num_layers

    def _hook(self, quarter: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if not module.fp8_initialized:
                return  # a layer that computes in BF16
            x = args[0].detach()
            gamma = getattr(module, "layer_norm_weight", None)
            self._measure(module, "input", quarter, x if gamma is None else rms_norm(x, gamma.detach(), module.eps))
            for weight in (p for n, p in module.named_parameters(recurse=False) if n.startswith("weight")):
                plain = weight.detach()
                self._measure(module, "weight", quarter, plain.dequantize() if is_quantised(weight) else plain)
            out = output[0] if isinstance(output, tuple) else output
            if out.requires_grad:
                out.register_hook(lambda grad: self._measure(module, "gradient", quarter, grad.detach()))

        return hook

    @torch.no_grad()
    def _measure(self, module: Any, kind: str, quarter: int, x: Tensor) -> None:
        """Count one tensor of a matrix product."""
        if not x.numel():
            return
        row = KINDS.index(kind)
        size = x.abs().float()
        finite = size.isfinite()
        size = size.where(finite, 0.0)
        amax = size.amax().double()
        self._amax[row, quarter] = torch.maximum(self._amax[row, quarter], amax)
        self._counts[row, 0] += x.numel()
        self._counts[row, 3] += (~finite).sum()
        if not self._per_tensor:
            return
        largest = module.fp8_meta["recipe"].fp8_format.value[kind == "gradient"]
        scale = self._scale_of(module, kind, amax, largest)
        self._scale[row, quarter] = torch.minimum(self._scale[row, quarter], scale)
        # Beyond the largest number by more than the rounding that ends at it.
        self._counts[row, 1] += (size * scale > largest * (1 + 2**-5)).sum()
        self._counts[row, 2] += ((size > 0) & (size * scale <= _SMALLEST[largest])).sum()

    def _scale_of(self, module: Any, kind: str, amax: Tensor, largest: float) -> Tensor:
        key, slot = _SLOTS[kind]
        state = module.fp8_meta.get(key)
        if hasattr(state, "scale"):
            return state.scale[slot].double()
        return torch.where(amax > 0, largest / amax, torch.ones_like(amax))

    def figures(self, group: dist.ProcessGroup) -> dict[str, float]:
        """Collective: the metrics `fp8_*` over all processes."""
        maxima = torch.cat((self._amax.flatten(), -self._scale.flatten()))
        sums = self._counts.clone()
        dist.all_reduce(maxima, dist.ReduceOp.MAX, group=group)
        dist.all_reduce(sums, group=group)
        amax, scale = maxima.view(2, len(KINDS), QUARTERS).tolist()
        found: dict[str, float] = {}
        for row, kind in enumerate(KINDS):
            for quarter in range(QUARTERS):
                if amax[row][quarter] > 0:
                    found[f"fp8_{kind}_amax_{quarter + 1}"] = amax[row][quarter]
                if scale[row][quarter] > -float("inf"):
                    found[f"fp8_{kind}_scale_{quarter + 1}"] = -scale[row][quarter]
            total, over, under, _ = sums[row].tolist()
            if self._per_tensor and total:
                found |= {f"fp8_{kind}_overflow": over / total, f"fp8_{kind}_underflow": under / total}
        found["fp8_nonfinite"] = round(float(sums[:, 3].sum()))
        return found


def delayed_states(chunks: Sequence[Any]) -> list[Tensor]:
    """Scales and histories of the delayed recipe's modules; empty for recipes that keep none.

    Attention's are among them: its modules have the metadata too.
    """
    return [
        getattr(state, name)
        for chunk in chunks
        for module in chunk.modules()
        if hasattr(module, "fp8_meta")
        for key in ("scaling_fwd", "scaling_bwd")
        if hasattr(state := module.fp8_meta.get(key), "amax_history")
        for name in ("scale", "amax_history")
    ]


@contextmanager
def state_kept(chunks: Sequence[Any], device: torch.device) -> Iterator[None]:
    """Put the delayed recipe's scales and histories, and the random numbers, back as they were after the block."""
    tensors = delayed_states(chunks)
    before = [t.clone() for t in tensors]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
