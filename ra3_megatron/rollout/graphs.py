"""CUDA graphs of decode passes: captured the second time a pass of a size is met, replayed from then on."""

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from ra3_megatron.config.errors import UserError
from ra3_megatron.model.fp8_passes import weight_addresses
from ra3_megatron.parallel.groups import Parallel
from ra3_megatron.rollout.forward import Forward, Outcome

log = logging.getLogger(__name__)


def why_no_graphs(parallel: Parallel, config: Any, chunks: Sequence[torch.nn.Module]) -> str:
    """Why decode passes cannot be captured here; empty when they can."""
    sizes = parallel.sizes
    if parallel.device.type != "cuda":
        return f"the device is {parallel.device.type}, which has no CUDA graphs"
    if sizes.tensor * sizes.pipeline > 1 or len(chunks) > 1:
        return (
            f"tensor {sizes.tensor} x pipeline {sizes.pipeline}: passes of several processes are not captured, only "
            "those of 1 x 1"
        )
    if getattr(config, "num_moe_experts", None):
        return "the model has experts, whose numbers of tokens are read by the host"
    return ""


def use_graphs(
    wish: bool | None, parallel: Parallel, config: Any, chunks: Sequence[torch.nn.Module]
) -> tuple[bool, str]:
    """Whether decode passes are captured, and one line for the log; raises UserError where True is impossible."""
    why = "latent.cuda_graphs is false" if wish is False else why_no_graphs(parallel, config, chunks)
    if wish and why:
        raise UserError(f"latent.cuda_graphs = true; {why}; leave it out, or set it to false")
    return not why, f"without CUDA graphs ({why})" if why else "as CUDA graphs"


class GraphStore:
    """Captured passes of one engine. `strict`: a pass that cannot be captured is an error, else it is run uncaptured.

    A graph has stored where weights and cache lie: it is dropped when the weights have moved. All graphs share their
    temporary memory, so an outcome is valid until the next pass.
    """

    def __init__(self, forward: Forward, strict: bool = False) -> None:
        self._forward, self._strict = forward, strict
        self._met: set[Hashable] = set()
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Outcome]] = {}
        self._pool: Any = None
        self._generation = -1
        self._addresses: tuple[int, ...] = ()
        self.broken = ""
        self.replays = 0

    def run(self, key: Hashable, compute: Callable[[], Outcome]) -> Outcome:
        """The pass `compute`, whose inputs lie in the same memory for equal keys; captured, replayed or just run."""
        # New weights are quantised by a pass that is no replay.
        if self.broken or not self._forward.ready:
            return compute()
        self._follow_weights()
        if key not in self._captured:
            if key not in self._met:
                # What is compiled, allocated or looked up at a first call is so outside of the capture.
                self._met.add(key)
                return compute()
            try:
                self._captured[key] = self._capture(compute)
            except RuntimeError as error:
                if self._strict:
                    raise
                self.broken = str(error).splitlines()[0]
                log.warning("decode passes go on without CUDA graphs: %s", self.broken)
                self._captured.clear()
                return compute()
            log.info("captured a decode pass: %s", key)
        graph, outcome = self._captured[key]
        graph.replay()
        self.replays += 1
        return outcome

    def _follow_weights(self) -> None:
        if self._generation == self._forward.generation:
            return
        self._generation = self._forward.generation
        addresses = weight_addresses(self._forward.chunks)
        if addresses != self._addresses:
            if self._captured:
                log.info("the weights lie elsewhere: %d captured decode passes are dropped", len(self._captured))
            self._captured.clear()
            self._addresses = addresses

    def _capture(self, compute: Callable[[], Outcome]) -> tuple[torch.cuda.CUDAGraph, Outcome]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog, a checkpoint that is being written) may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outcome = compute()
        return graph, outcome
