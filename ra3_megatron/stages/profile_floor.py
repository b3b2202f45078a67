"""The least time the parts of a step could take: operations at the measured speed of matrix products, bytes at the
measured speed of memory and of the network."""

from collections.abc import Mapping
from dataclasses import dataclass

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.estimate import estimate_memory, flops
from ra3_megatron.config.hardware import Chip
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.validate import Layout
from ra3_megatron.parallel.speed import DeviceSpeed


@dataclass(frozen=True)
class Work:
    """What one step does over all replicas."""

    trained: float
    """Tokens trained on, padding included."""
    scored: float
    """Tokens run forward for log-probabilities, padding included."""
    rolled_out: float
    """Tokens fed by the rollout engine."""
    forward_passes: float
    """Of the rollout engine."""
    updates: float
    """Optimizer updates."""
    attended: float
    """Keys a query attends to on average, as the stage reckons its FLOPs: half a window, or half a row."""


@dataclass(frozen=True)
class Floor:
    """A part of a step beside the least time it could take."""

    phase: str
    """As `profile_recorder` names it."""
    seconds: float
    """Least seconds per step."""
    what: str
    """Where the figure comes from."""


def model_flops(a: Architecture, work: Work) -> float:
    """Operations of the model in one step, over all ranks; what is computed again in the backward pass does not
    count."""
    forward = flops(a, work.scored + work.rolled_out, work.attended, training=False)
    return forward + flops(a, work.trained, work.attended, training=True)


def floors(
    config: RunConfig, a: Architecture, layout: Layout, work: Work, speed: DeviceSpeed, network: Mapping[str, float]
) -> list[Floor]:
    """Least seconds of every phase that has work, on the fullest rank. `network`: bus bandwidth of the groups `dp_cp`
    and `tp`, bytes/s, of those that have more than one process."""
    world, memory = layout.world, estimate_memory(config, a, layout)
    found = []

    def products(phase: str, tokens: float, training: bool) -> Floor:
        operations = flops(a, tokens, work.attended, training) / world
        return Floor(phase, operations / speed.flops, f"{operations:.3g} FLOP at the measured matrix product")

    if work.trained:
        found.append(products("update/forward and backward", work.trained, True))
        moved = _optimizer_bytes(config, memory.parameters_on_rank, layout) * work.updates
        found.append(Floor("update/optimizer", moved / speed.bytes, f"{moved:.3g} bytes at the measured copy"))
    if work.scored:
        found.append(products("score", work.scored, False))
    if work.rolled_out:
        compute = products("rollout", work.rolled_out, False)
        # Every pass reads all weights once; each replica makes its own passes.
        read = work.forward_passes / layout.data * memory.weights
        weights = Floor(
            "rollout", read / speed.bytes, f"{work.forward_passes / layout.data:.0f} passes that read the weights"
        )
        found.append(max(compute, weights, key=lambda f: f.seconds))
    found += _communication(config, a, layout, work, network)
    return found


def _optimizer_bytes(config: RunConfig, parameters: int, layout: Layout) -> float:
    """Read: gradient, master weight, two moments, in fp32; written: all but the gradient, and the model's own weight
    where that is another."""
    each = 4 * 4 + 3 * 4 + (0 if config.model.precision == "fp32" else 2)
    return parameters * each / (layout.data * layout.context)


def _communication(
    config: RunConfig, a: Architecture, layout: Layout, work: Work, network: Mapping[str, float]
) -> list[Floor]:
    """Gradients and weights between replicas, activations between the processes that share matrices."""
    element = 4 if config.model.precision == "fp32" else 2
    found = []
    shards = layout.data * layout.context
    if "dp_cp" in network and work.trained:
        parameters = estimate_memory(config, a, layout).parameters_on_rank
        moved = (4 + element) * parameters * (shards - 1) / shards * work.updates
        what = f"gradients added up in fp32 and weights gathered, {moved:.3g} bytes"
        found.append(Floor("communication of replicas", moved / network["dp_cp"], what))
    if "tp" in network:
        t = layout.tensor
        # Two all-reduces per layer forward, two backward, each twice the tensor less its own share.
        passes = 2 * work.trained + work.scored + work.rolled_out
        tokens = passes / (layout.data * layout.context) / layout.pipeline
        moved = a.num_layers * 2 * 2 * (t - 1) / t * tokens * a.hidden_size * element
        what = f"activations of shared matrices, {moved:.3g} bytes"
        found.append(Floor("communication of tensor parallelism", moved / network["tp"], what))
    return found


def utilisation(
    operations: float, seconds: float, layout: Layout, speed: DeviceSpeed, known: Chip | None
) -> dict[str, float]:
    """Model FLOPs utilisation: operations per second and rank, of the measured product and of the maker's figures."""
    rate = operations / seconds / layout.world
    found = {"flops_per_second_and_rank": rate, "of_measured": rate / speed.flops}
    if known is not None:
        found["of_bf16_peak"] = rate / known.bf16
        if known.fp8 is not None:
            found["of_fp8_peak"] = rate / known.fp8
    return found
