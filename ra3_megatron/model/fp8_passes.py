"""What FP8 needs of forward passes that are no training: whole blocks of tokens, and untouched scaling histories.

With delayed scaling every pass writes the largest numbers it meets into the history that the next training step's
scales come from, whether it trains or not.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.fp4_utils import get_fp4_align_size
from megatron.core.fp8_utils import get_fp8_align_size
from torch import Tensor

from ra3_megatron.model.factory import unwrap


def token_multiple(config: Any) -> int:
    """What the number of tokens of a pass must be a multiple of for the model's matrix products; 1 without FP8."""
    if config.fp4:
        return get_fp4_align_size(config.fp4_recipe)
    return get_fp8_align_size(config.fp8_recipe) if config.fp8 else 1


@contextmanager
def histories_kept(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Passes inside the block leave no trace in the scales of delayed scaling; nothing with other recipes.

    Inside a CUDA graph the restoring is a part of it.
    """
    config: Any = unwrap(chunks[0]).config
    if not config.fp8 or config.fp8_recipe != "delayed":
        yield
        return
    before = _largest_numbers(chunks)
    kept = [x.clone() for x in before.values()]
    try:
        yield
    finally:
        after = _largest_numbers(chunks)
        if kept:
            torch._foreach_copy_([after[key] for key in before], kept)
        # Histories that the first pass of all has made begin with zeros.
        if new := [x for key, x in after.items() if key not in before]:
            torch._foreach_zero_(new)


def _largest_numbers(chunks: Sequence[torch.nn.Module]) -> dict[tuple[int, int], Tensor]:
    """By module: what the passes since the last update of the scales have met, the newest row of the history."""
    found = {}
    for number, chunk in enumerate(chunks):
        for index, module in enumerate(chunk.modules()):
            state = getattr(module, "fp8_meta", {}).get("scaling_fwd")
            history = getattr(state, "amax_history", None)
            if history is not None:
                found[number, index] = history[0]
    return found


def weight_addresses(chunks: Sequence[torch.nn.Module]) -> tuple[int, ...]:
    """Where on the device everything lies that a pass reads of the model: what a CUDA graph has stored.

    Weights, buffers, quantised weights and scales. Quantised for the forward pass only: what the backward pass reads
    comes and goes with training.
    """
    found: list[int] = []
    for chunk in chunks:
        for tensor in (*chunk.parameters(), *chunk.buffers()):
            found += _addresses(tensor)
        for module in chunk.modules():
            for workspace in getattr(module, "_fp8_workspaces", {}).values():
                found += _addresses(workspace)
            state = getattr(module, "fp8_meta", {}).get("scaling_fwd")
            for name in ("scale", "amax_history"):
                if isinstance(part := getattr(state, name, None), Tensor):
                    found.append(part.data_ptr())
    return tuple(found)


def _addresses(tensor: Any) -> list[int]:
    """Of a plain tensor, or of the forward pass's parts of a quantised one."""
    if not hasattr(tensor, "get_data_tensors"):
        return [tensor.data_ptr()]
    parts = {k: v for k, v in vars(tensor).items() if isinstance(v, Tensor)}
    return [v.data_ptr() for k, v in sorted(parts.items()) if "columnwise" not in k and "transpose" not in k]
