"""What each rank of a small world reports: bytes it really holds, and who is blamed for a NaN."""

from dataclasses import replace
from typing import Any

from ra3_megatron.config.estimate import estimate_memory, parameters_per_rank
from ra3_megatron.config.validate import resolve_layout
from ra3_megatron.parallel.groups import initialize
from ra3_megatron.training.components import cross_entropy_component
from ra3_megatron.training.nonfinite import NonFiniteStep
from tests.unit.training import tiny


def memory(layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per layout: parameters and bytes by purpose after one step, beside the estimate."""
    return [_memory(dict(layout)) for layout in layouts]


def _memory(layout: dict[str, Any]) -> dict[str, Any]:
    precision, tied = layout.pop("precision"), layout.pop("tied")
    settings = tiny.config(parallel=layout, model={"precision": precision}, train={"global_batch_size": 4})
    settings = replace(settings, run=replace(settings.run, arms=("ntp",)))
    with initialize(settings.parallel) as parallel:
        e = tiny.engine(settings, parallel, [cross_entropy_component()], tied)
        share = 4 // parallel.sizes.data
        e.train_step([tiny.batch(share * parallel.data_rank + n) for n in range(share)], step=1)
        arithmetic = resolve_layout(settings, parallel.world_size, tiny.architecture(tied))
        estimate = estimate_memory(settings, tiny.architecture(tied), arithmetic)
        buffers = [b for chunk in e.chunks for b in chunk.buffers]
        return {
            "parameters": sum(p.numel() for chunk in e.chunks for p in chunk.parameters()),
            "parameters_estimated": parameters_per_rank(tiny.architecture(tied), arithmetic)[parallel.pipeline_rank],
            "weights": sum(p.nbytes for chunk in e.chunks for p in chunk.parameters()),
            "gradients": sum(b.grad_data.nbytes for b in buffers),
            "optimizer": sum(t.nbytes for t in tiny.optimizer_tensors(e)),
            "estimated": {k: getattr(estimate, k) for k in ("weights", "gradients", "optimizer")},
            "fullest": estimate.parameters_on_rank,
        }


def blame() -> str:
    """Two replicas, of which the second alone has a bad token in its second micro-batch; what this rank raised."""
    settings = tiny.config(train={"global_batch_size": 4})
    with initialize(settings.parallel) as parallel:
        e = tiny.engine(settings, parallel, [tiny.scaled()])
        bad = (6,) if parallel.rank == 1 else ()
        batches = [tiny.batch(1, scale=tiny.scale()), tiny.batch(2, scale=tiny.scale(*bad))]
        try:
            e.train_step(batches, step=5)
        except NonFiniteStep as error:
            return str(error)
    return "nothing was raised"


def both(layouts: list[dict[str, Any]]) -> dict[str, Any]:
    """One start for both, since imports take longest."""
    return {"memory": memory(layouts), "blame": blame()}
