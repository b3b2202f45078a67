"""What an operation in a profiler's trace is for, by its name; and lengths of time that several of them cover."""

import re
from collections.abc import Iterable, Sequence

GEMM, ATTENTION, ELEMENTWISE, MOVING = "matrix products", "attention", "norms and elementwise", "copies and indexing"
OPTIMIZER, CASTS, COMMUNICATION, HOST = "optimizer", "FP8 casts", "communication", "Python and dispatch"
IDLE = "device idle"
KINDS = (GEMM, ATTENTION, ELEMENTWISE, MOVING, CASTS, OPTIMIZER, COMMUNICATION, HOST, IDLE)
"""All kinds, in the order in which they are shown."""

_COMMUNICATION = re.compile(r"^(nccl|gloo:|c10d::|record_param_comms|mpi:|ucc:)", re.IGNORECASE)

# Kernels carry the names of their templates, so the order matters: an attention kernel is made of cutlass's products,
# and an optimizer's is an elementwise one.
_KERNELS = (
    (COMMUNICATION, _COMMUNICATION),
    (MOVING, re.compile(r"^(memcpy|memset)", re.IGNORECASE)),
    (ATTENTION, re.compile(r"flash|fmha|attention|attn|sdpa", re.IGNORECASE)),
    (OPTIMIZER, re.compile(r"adam|multi_?tensor|l2norm|lpnorm", re.IGNORECASE)),
    (CASTS, re.compile(r"cast_transpose|quantiz|amax|fp8|float8|block_scal", re.IGNORECASE)),
    (GEMM, re.compile(r"nvjet|gemm|gemv|xmma|cublas|cutlass.*(wgmma|mma)|splitk", re.IGNORECASE)),
    (
        MOVING,
        re.compile(r"copy|catarray|index|gather|scatter|embedding|transpose|permut|fillfunctor", re.IGNORECASE),
    ),
)

_OPERATORS = (
    (COMMUNICATION, _COMMUNICATION),
    (ATTENTION, re.compile(r"scaled_dot_product|flash_attention|efficient_attention|cudnn_attention")),
    (OPTIMIZER, re.compile(r"^aten::_(fused_adam|foreach)")),
    (GEMM, re.compile(r"^aten::(_?addmm|mm$|bmm$|baddbmm|addbmm|matmul$|_scaled_mm|mkldnn_linear|linear$|mv$|dot$)")),
    (
        MOVING,
        re.compile(
            r"^aten::(copy_|_to_copy|clone|contiguous|cat|stack|index|_index|gather|scatter|embedding|fill_|zero_|select|"
            r"slice|masked_select|nonzero|repeat|new_|empty|zeros|full|_unsafe_view|reshape)"
        ),
    ),
    (ELEMENTWISE, re.compile(r"^aten::")),
)


def kind_of_kernel(name: str) -> str:
    """Kind of a kernel that ran on a GPU; what none of the patterns knows is elementwise."""
    return next((kind for kind, pattern in _KERNELS if pattern.search(name)), ELEMENTWISE)


def kind_of_operator(name: str) -> str:
    """Kind of a host operator, by whose own time (without what it calls) it is counted; all but torch's are Python."""
    return next((kind for kind, pattern in _OPERATORS if pattern.search(name)), HOST)


Span = tuple[float, float]
"""Beginning and end."""


def union(spans: Iterable[Span]) -> list[Span]:
    """The same moments as spans that do not touch, in order; empty ones are left out."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if end <= start:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def length(spans: Sequence[Span]) -> float:
    """Time that spans which do not overlap cover."""
    return sum(end - start for start, end in spans)


def overlap(first: Sequence[Span], second: Sequence[Span]) -> float:
    """Time covered by both; each of them as `union` makes it."""
    total, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        total += max(0.0, min(first[i][1], second[j][1]) - max(first[i][0], second[j][0]))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return total
