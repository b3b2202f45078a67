"""How fast this device multiplies matrices and moves memory, measured in the process that is to be judged by it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ra3_megatron.parallel.groups import Parallel

GPU_MATRIX, CPU_MATRIX = 8192, 1024
"""Rows and columns of the matrices that are multiplied."""
GPU_COPY, CPU_COPY = 1 << 30, 1 << 27
"""Bytes that are copied: many times what caches hold."""
REPEATS = 10
"""Runs of which the fastest counts."""


@dataclass(frozen=True)
class DeviceSpeed:
    """Ceilings measured on one device."""

    flops: float
    """Matrix product in the model's numbers (BF16 for FP8), FLOP/s."""
    bytes: float
    """Copy, bytes read and written per second."""
    matrix: int
    """Rows and columns of the matrices."""


def measure_speed(parallel: Parallel, dtype: torch.dtype, repeats: int = REPEATS) -> DeviceSpeed:
    """Ceilings of this process's device with the threads it has. Takes a second; the memory is given back."""
    size, count = (GPU_MATRIX, GPU_COPY) if parallel.on_gpu else (CPU_MATRIX, CPU_COPY)
    product = _product_seconds(parallel, size, dtype, repeats)
    copy = _copy_seconds(parallel, count, repeats)
    if parallel.on_gpu:
        torch.cuda.empty_cache()
    return DeviceSpeed(flops=2 * size**3 / product, bytes=2 * count / copy, matrix=size)


def _product_seconds(parallel: Parallel, size: int, dtype: torch.dtype, repeats: int) -> float:
    a, b = (torch.randn(size, size, device=parallel.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return _fastest(parallel, lambda: torch.mm(a, b, out=out), repeats)


def _copy_seconds(parallel: Parallel, count: int, repeats: int) -> float:
    source = torch.zeros(count, dtype=torch.uint8, device=parallel.device)
    target = torch.empty_like(source)
    return _fastest(parallel, lambda: target.copy_(source), repeats)


def _fastest(parallel: Parallel, work: Callable[[], Tensor], repeats: int) -> float:
    """Seconds of the fastest of `repeats` runs, after one that warms up."""
    best = float("inf")
    for number in range(repeats + 1):
        parallel.synchronize()
        start = time.perf_counter()
        work()
        parallel.synchronize()
        if number:
            best = min(best, time.perf_counter() - start)
    return best
