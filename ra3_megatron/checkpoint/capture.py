"""Everything one checkpoint must hold so that a resumed run continues bit for bit, gathered and put back.

Parameters, distributed optimizer (main parameters, moments, step, gradient scaler), learning-rate schedule and the
random number generators of every rank.
"""

import gc
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedObject

from ra3_megatron.checkpoint.distributed import sharding_metadata
from ra3_megatron.checkpoint.fp8_state import make_plain, put_back
from ra3_megatron.model.factory import unwrap
from ra3_megatron.model.precision import renew_quantised_weights
from ra3_megatron.parallel.groups import Parallel


def layout(parallel: Parallel) -> dict[str, int]:
    """Parallel sizes as plain numbers; random states are put back only where these are the same."""
    sizes = parallel.sizes
    # Left out where experts are not spread: checkpoints written before there were any know no such sizes.
    expert_tensor = sizes.expert_tensor or sizes.tensor
    spread = sizes.expert > 1 or expert_tensor != sizes.tensor
    return {
        "tensor": sizes.tensor,
        "pipeline": sizes.pipeline,
        "virtual_pipeline": sizes.virtual_pipeline or 1,
        "context": sizes.context,
        "data": sizes.data,
        **({"expert": sizes.expert, "expert_tensor": expert_tensor} if spread else {}),
    }


def synchronise_parameters(model_chunks: Sequence[torch.nn.Module]) -> None:
    """Collective: complete parameters whose gathering is put off to the next forward pass (overlap_param_gather)."""
    chunk: Any
    for chunk in model_chunks:
        ddp_config = getattr(chunk, "ddp_config", None)
        if ddp_config is not None and ddp_config.overlap_param_gather:
            with torch.no_grad():
                chunk.start_param_sync(force_sync=True)


def random_states(parallel: Parallel) -> dict[str, Any]:
    """States of all generators of this rank."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002  the global generator is what libraries use
    states = {
        "python": random.getstate(),
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    if parallel.on_gpu:
        states["cuda"] = torch.cuda.get_rng_state(parallel.device)
    return states


def restore_random_states(states: dict[str, Any], parallel: Parallel) -> None:
    """Inverse of `random_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy = states["numpy"]
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if "cuda" in states and parallel.on_gpu:
        torch.cuda.set_rng_state(states["cuda"], parallel.device)
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])


def _rng_entry(data: Any, parallel: Parallel) -> ShardedObject:
    return ShardedObject("rng", data, (parallel.world_size,), (parallel.rank,), replica_id=0)


def _own_model_state(model_chunks: Sequence[torch.nn.Module], parallel: Parallel) -> dict[str, Any]:
    """Sharded state whose data are the parameters themselves, which the optimizer finds its own by."""
    metadata = sharding_metadata(parallel)
    return {f"model{i}": unwrap(c).sharded_state_dict(metadata=metadata) for i, c in enumerate(model_chunks)}


def _make_plain(state: dict[str, Any], model_chunks: Sequence[torch.nn.Module]) -> None:
    for i, chunk in enumerate(model_chunks):
        make_plain(state[f"model{i}"], chunk)


def model_state(model_chunks: Sequence[torch.nn.Module], parallel: Parallel) -> dict[str, Any]:
    """Sharded state of all chunks, by `model0`, `model1`, …; the names inside are the same for every layout."""
    state = _own_model_state(model_chunks, parallel)
    _make_plain(state, model_chunks)
    return state


@contextmanager
def _old_objects_set_aside() -> Iterator[None]:
    """Keep garbage collections inside the block to objects made inside it.

    Megatron collects after it has gathered the optimizer's state; walking everything that was ever imported takes it
    0.2 s, in which training stands still.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def gather_state(
    model_chunks: Sequence[torch.nn.Module],
    optimizer: Any,
    lr_scheduler: Any,
    extras: dict[str, Any],
    parallel: Parallel,
) -> dict[str, Any]:
    """Collective: the sharded state of a save. `extras` are plain values, the same on every rank."""
    synchronise_parameters(model_chunks)
    state = _own_model_state(model_chunks, parallel)
    if optimizer is not None:
        models = {name: dict(tensors) for name, tensors in state.items()}
        with _old_objects_set_aside():
            state["optimizer"] = optimizer.sharded_state_dict(models, metadata=sharding_metadata(parallel))
    _make_plain(state, model_chunks)
    if lr_scheduler is not None:
        state["lr_scheduler"] = lr_scheduler.state_dict()
    state["extras"] = extras
    state["rng"] = _rng_entry(random_states(parallel), parallel)
    return state


def wanted_state(
    model_chunks: Sequence[torch.nn.Module], optimizer: Any, same_layout: bool, parallel: Parallel
) -> dict[str, Any]:
    """Collective: the sharded state to fill from a checkpoint; random states only where the layout is the same."""
    state = _own_model_state(model_chunks, parallel)
    if optimizer is not None:
        models = {name: dict(tensors) for name, tensors in state.items()}
        metadata = sharding_metadata(parallel)
        state["optimizer"] = optimizer.sharded_state_dict(models, is_loading=True, metadata=metadata)
    _make_plain(state, model_chunks)
    if same_layout:
        state["rng"] = _rng_entry(None, parallel)
    return state


def put_back_models(model_chunks: Sequence[torch.nn.Module], values: dict[str, Any]) -> None:
    """Load what came back into the model chunks."""
    for i, chunk in enumerate(model_chunks):
        put_back(chunk, values[f"model{i}"])
    renew_quantised_weights(model_chunks)
