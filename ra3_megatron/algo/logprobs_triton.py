"""Log-probabilities of tokens on a GPU: the logits are read once forward and once backward, in their own type.

With torch's operations [tokens, vocabulary] passes through memory a dozen times in fp32, and a copy of it in fp32 waits
for the backward pass: 2.5 GB for 4096 tokens of a vocabulary of 152 k. Here one number per token is kept and the logits
themselves, whose memory the gradient takes. Triton comes with the CUDA builds of torch; `HAVE_TRITON` says whether.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, empty, float32

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
except ModuleNotFoundError:
    HAVE_TRITON = False
    triton = tl = None
_jit: Callable[[Any], Any] = triton.jit if HAVE_TRITON else lambda function: function
BLOCK = 8192
"""Columns that a program holds at once."""


@_jit
def _forward(
    logits, labels, maxima, sums, chosen, stride, start, inverse_temperature, valid: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row: maximum over its valid columns, sum of exp(x - maximum), and the label's x if this process has it."""
    row = tl.program_id(0).to(tl.int64)
    maximum = -float("inf")
    total = 0.0
    for begin in range(0, valid, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + columns, mask=columns < valid, other=-float("inf")).to(tl.float32)
        x = x * inverse_temperature
        larger = tl.maximum(maximum, tl.max(x, 0))
        # A block of columns that may not be drawn is all -inf; -inf less -inf would be NaN.
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(x - shift), 0)
        maximum = larger
    label = tl.load(labels + row) - start
    mine = (label >= 0) & (label < valid)
    x = tl.load(logits + row * stride + label, mask=mine, other=0.0).to(tl.float32) * inverse_temperature
    tl.store(maxima + row, maximum)
    tl.store(sums + row, total)
    tl.store(chosen + row, x)


@_jit
def _backward(
    logits, gradient, labels, normaliser, grad, stride, width, valid, start, inverse_temperature, BLOCK: tl.constexpr
):  # fmt: skip
    """One block of a row: grad x (1[label] - exp(x - normaliser)) / temperature, 0 past the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + columns, mask=columns < valid, other=-float("inf")).to(tl.float32)
    p = tl.exp(x * inverse_temperature - tl.load(normaliser + row))
    hit = columns == tl.load(labels + row) - start
    out = (hit.to(tl.float32) - p) * (tl.load(grad + row) * inverse_temperature)
    out = tl.where(columns < valid, out, 0.0)
    tl.store(gradient + row * stride + columns, out.to(gradient.dtype.element_ty), mask=columns < width)


def _block(width: int) -> int:
    return min(BLOCK, triton.next_power_of_2(max(width, 16)))


def row_statistics(
    logits: Tensor, labels: Tensor, start: int, valid: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of this process's `valid` first columns: (maximum, sum of exp(x - maximum), x of the label or 0), [tokens] fp32.

    x are the logits [tokens, columns] over the temperature, `labels` [tokens] global ids, `start` the first column's.
    """
    maxima, sums, chosen = (empty(len(logits), dtype=float32, device=logits.device) for _ in range(3))
    if len(logits):
        _forward[(len(logits),)](
            logits, labels, maxima, sums, chosen, logits.stride(0), start, 1.0 / temperature,
            valid=valid, BLOCK=_block(valid), num_warps=16,
        )  # fmt: skip
    return maxima, sums, chosen


def write_gradient(
    logits: Tensor, gradient: Tensor, labels: Tensor, normaliser: Tensor, grad: Tensor, start: int, valid: int,
    temperature: float,
) -> None:  # fmt: skip
    """Gradient of sum(grad x log-probability) in the logits, into `gradient`, which may be the logits' own memory.

    `normaliser` [tokens]: log of the sum of exp(x) over the whole vocabulary.
    """
    tokens, width = logits.shape
    block = _block(width)
    if tokens:
        _backward[(tokens, triton.cdiv(width, block))](
            logits, gradient, labels, normaliser, grad, logits.stride(0), width, valid, start, 1.0 / temperature,
            BLOCK=block, num_warps=16,
        )  # fmt: skip
