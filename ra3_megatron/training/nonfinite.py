"""Which rank, step and micro-batch a NaN or infinity came from."""

import math
from collections.abc import Sequence

import torch

from ra3_megatron.data.batch import TrainBatch
from ra3_megatron.parallel.collectives import gather_objects
from ra3_megatron.parallel.groups import Parallel


class NonFiniteStep(RuntimeError):
    """A loss or gradient was NaN or infinite and the run was told to stop."""


def explain_nonfinite(
    parallel: Parallel,
    chunks: Sequence[torch.nn.Module],
    step: int,
    loss: float,
    grad_norm: float,
    local_losses: Sequence[float],
    batches: Sequence[TrainBatch],
) -> str:
    """One line that names step, ranks and micro-batches (with the range of their token ids), or else parameters.

    Collective over the world. `local_losses` are this rank's losses by micro-batch, empty before the last stage. A
    gradient is named only where every loss is finite: after its reduction a rank has the others' NaNs too.
    """
    losses = [
        f"micro-batch {i} (token ids {int(batches[i].input_ids.min())}..{int(batches[i].input_ids.max())}, "
        f"first {batches[i].input_ids[:8].tolist()})"
        for i, value in enumerate(local_losses)
        if not math.isfinite(value)
    ]
    gradients = []
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            grad = getattr(parameter, "main_grad", None)
            if grad is not None and not bool(torch.isfinite(grad).all()):
                gradients.append(f"gradient of {name.removeprefix('module.')}")
                break
    everyone = gather_objects(parallel.world, (losses, gradients), f"non-finite step {step}")
    kind = 0 if any(found[0] for found in everyone) else 1
    places = "; ".join(f"rank {rank}: {', '.join(found[kind])}" for rank, found in enumerate(everyone) if found[kind])
    return f"step {step}: loss {loss}, gradient norm {grad_norm}; found at {places or 'no single rank'}"
