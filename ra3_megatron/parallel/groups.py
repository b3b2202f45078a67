"""Process groups over gloo or NCCL, the device, seeds and threads.

Nobody else in the project asks for CUDA or decides between gloo and NCCL: they hold a `Parallel`.
"""

import logging
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.sections import ParallelConfig
from ra3_megatron.config.validate import replicas
from ra3_megatron.parallel.cpu_layer import install
from ra3_megatron.parallel.fused_adam import install_fused_adam
from ra3_megatron.parallel.launch import Launch, launch_from_env
from ra3_megatron.parallel.whereabouts import Group, Whereabouts

GROUP_NAMES = ("world", "tp", "pp", "cp", "dp", "dp_cp", "mp")
"""Groups a `Parallel` offers: all, tensor, pipeline, context, data, data x context, tensor x pipeline."""


FAREWELL_S = 3.0
"""How long rank 0, having failed, serves the store for the others to read why, seconds."""


@dataclass(frozen=True)
class ParallelSizes:
    """How many processes share what; `tensor * pipeline * context * data == world`."""

    tensor: int = 1
    """Processes that share every matrix."""
    pipeline: int = 1
    """Processes that hold consecutive layers."""
    context: int = 1
    """Processes that share every sequence."""
    data: int = 1
    """Replicas of the model."""
    world: int = 1
    """All processes."""
    virtual_pipeline: int | None = None
    """Groups of layers per pipeline process; none = one."""
    sequence: bool = False
    """Whether norms are sharded along the sequence over the tensor-parallel processes."""
    expert: int = 1
    """Processes that deal the experts of a layer out."""
    expert_tensor: int | None = None
    """Processes that share every matrix of an expert; none = `tensor`."""

    @classmethod
    def from_config(cls, config: ParallelConfig, world: int) -> "ParallelSizes":
        """Fit `config` to `world` processes; raises UserError with the arithmetic when it does not."""
        data = replicas(config, world)
        return cls(
            config.tensor, config.pipeline, config.context, data, world, config.virtual_pipeline, config.sequence,
            config.expert, config.expert_tensor or config.tensor,
        )  # fmt: skip


@dataclass
class Parallel:
    """This process's place: sizes, ranks, device, groups. Made by `initialize`, ended by `shutdown`."""

    sizes: ParallelSizes
    """Parallel sizes."""
    launch: Launch
    """How this process was started."""
    device: torch.device
    """Where the model lives."""
    backend: str
    """`gloo` or `nccl`."""
    whereabouts: Whereabouts
    """The store's diary; see `ra3_megatron.parallel.collectives`."""
    timeout_s: float
    """Default deadline of every collective, seconds."""
    first_rank: int = 0
    """Number of this world's first process among all processes of the run: above 0 where a run is split into several
    worlds (`ra3_megatron.parallel.split`). Groups and messages name processes by their number among all."""
    pg_collection: Any = None
    """Megatron-Core's ProcessGroupCollection."""
    starts: int = 0
    """How often this world's groups were started; keeps the keys of one time in the store apart from the next."""
    _groups: dict[str, Group] = field(default_factory=dict)
    _open: bool = True

    def group(self, name: str) -> Group:
        """The group of kind `name` (see `GROUP_NAMES`) that this rank belongs to."""
        return self._groups[name]

    @property
    def world(self) -> Group:
        """All ranks."""
        return self._groups["world"]

    @property
    def rank(self) -> int:
        """Rank in this world."""
        return self.launch.rank

    @property
    def world_size(self) -> int:
        """Number of processes of this world."""
        return self.launch.world

    @property
    def local_rank(self) -> int:
        """Rank on this node."""
        return self.launch.local_rank

    @property
    def tensor_rank(self) -> int:
        """Position among the processes that share every matrix."""
        return self._groups["tp"].rank

    @property
    def pipeline_rank(self) -> int:
        """Pipeline stage."""
        return self._groups["pp"].rank

    @property
    def context_rank(self) -> int:
        """Position among the processes that share every sequence."""
        return self._groups["cp"].rank

    @property
    def data_rank(self) -> int:
        """Replica number; ranks of one context-parallel group have the same."""
        return self._groups["dp"].rank

    @property
    def is_main(self) -> bool:
        """Whether this is the first process of all."""
        return self.first_rank + self.launch.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this process holds the embedding (stage 0)."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process holds the output layer (last stage)."""
        return self.pipeline_rank == self.sizes.pipeline - 1

    @property
    def on_gpu(self) -> bool:
        """Whether the model lives on CUDA."""
        return self.device.type == "cuda"

    def mark(self, phase: str) -> None:
        """Say what this rank is doing, e.g. "train step 39"; timeouts of other ranks will quote it."""
        self.whereabouts.mark(phase)

    def synchronize(self) -> None:
        """Wait for work queued on the device; nothing on a CPU."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def peak_memory_bytes(self) -> int | None:
        """Largest device memory held so far, bytes; None on a CPU."""
        return int(torch.cuda.max_memory_allocated(self.device)) if self.on_gpu else None

    def shutdown(self, failed: bool = False) -> None:
        """End all groups; with `failed` NCCL's are aborted, since a dead peer would never answer. Idempotent."""
        if not self._open:
            return
        self._open = False
        if not failed and self.world_size > 1:
            self._leave_store(self.timeout_s)
        self.end_groups(failed)
        if failed and self.world_size > 1:
            # The connections are closed, which wakes peers out of collectives; why is written in the store.
            self._leave_store(FAREWELL_S)

    def start_groups(self) -> None:
        """Start this world's groups, torch's and Megatron-Core's; collective over it."""
        self.starts += 1
        timeout = timedelta(seconds=self.timeout_s)
        key = f"c10d/{self.starts}/{self.first_rank}x{self.world_size}"
        store = dist.PrefixStore(key, self.whereabouts.store)
        dist.init_process_group(self.backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timeout)
        from megatron.core import parallel_state
        from megatron.core.process_groups_config import ProcessGroupCollection

        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=self.sizes.tensor,
            pipeline_model_parallel_size=self.sizes.pipeline,
            virtual_pipeline_model_parallel_size=self.sizes.virtual_pipeline,
            context_parallel_size=self.sizes.context,
            expert_model_parallel_size=self.sizes.expert,
            expert_tensor_parallel_size=self.sizes.expert_tensor,
            distributed_timeout_minutes=self.timeout_s / 60,
        )
        self.pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        _build_groups(self, timeout)

    def end_groups(self, failed: bool = False) -> None:
        """End them; models and optimizers made with them are dead. Idempotent."""
        from megatron.core import num_microbatches_calculator, parallel_state

        num_microbatches_calculator.unset_num_microbatches_calculator()
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            if failed and self.backend == "nccl":
                dist.distributed_c10d._abort_process_group()
            else:
                dist.destroy_process_group()

    def _leave_store(self, seconds: float) -> None:
        """Rank 0 may serve the store, so it goes last; it waits no longer than `seconds` for the others."""
        store = self.whereabouts.store
        try:
            store.set(f"left/{self.rank}", "")
            if self.is_main:
                store.wait([f"left/{r}" for r in range(self.world_size)], timedelta(seconds=seconds))
        except dist.DistNetworkError:
            return  # whoever served the store is gone, and nobody waits for this rank
        except dist.DistStoreError:
            gone = [r for r in range(self.world_size) if not store.check([f"left/{r}"])]
            logging.getLogger(__name__).log(
                logging.DEBUG if seconds == FAREWELL_S else logging.WARNING,
                "ranks %s did not shut down within %.0f s; last seen: %s",
                gone,
                seconds,
                ", ".join(f'{s.rank} "{s.phase}"' for s in self.whereabouts.sightings(tuple(gone))),
            )

    def __enter__(self) -> "Parallel":
        return self

    def __exit__(self, kind: Any, *_rest: Any) -> None:
        self.shutdown(failed=kind is not None)


def _set_threads(config: ParallelConfig, launch: Launch) -> None:
    if "OMP_NUM_THREADS" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.threads or max(1, cores // launch.local_world))


def _pick_device(launch: Launch) -> tuple[torch.device, str]:
    if not torch.cuda.is_available():
        return torch.device("cpu"), "gloo"
    count = torch.cuda.device_count()
    # srun with one GPU per task shows each process only its own.
    index = 0 if count == 1 and launch.source == "srun" else launch.local_rank
    if index >= count:
        raise UserError(
            f"{launch.local_world} processes were started on this node but it shows {count} GPU(s); "
            "start one process per GPU, or set CUDA_VISIBLE_DEVICES='' to run on the CPU"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index), "nccl"


def _open_store(launch: Launch, timeout: timedelta) -> dist.Store:
    if launch.address is None or launch.port is None:
        return dist.HashStore()
    # torchrun serves the store itself; otherwise rank 0 does.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        served = dist.TCPStore(launch.address, launch.port, None, False, timeout)
        return dist.PrefixStore(f"/worker/attempt_{attempt}", served)
    place = (launch.address, launch.port)
    if place not in _served:
        try:
            _served[place] = dist.TCPStore(launch.address, launch.port, launch.world, launch.rank == 0, timeout)
        except dist.DistNetworkError as error:
            raise UserError(
                f"rank {launch.rank} could not reach rank 0 at {launch.address}:{launch.port} within "
                f"{timeout.total_seconds():.0f} s ({error}); check MASTER_ADDR and MASTER_PORT, and that all "
                f"{launch.world} processes were started"
            ) from error
    return _served[place]


_served: dict[tuple[str, int], dist.Store] = {}
"""Stores that rank 0 serves; a port cannot be served twice in one process, so a second start takes the first's."""

_lives = 0
"""How many handles this process has made; keeps the keys of one life of the store apart from the next."""


def initialize(config: ParallelConfig | None = None, launch: Launch | None = None) -> Parallel:
    """Start this process's groups and return the handle.

    Reads the place from the environment (`launch_from_env`) unless `launch` is given. Without a GPU it installs the
    CPU layer and uses gloo, with one it uses NCCL. Raises UserError when the sizes do not fit the processes.
    """
    config = config or ParallelConfig()
    launch = launch or launch_from_env()
    sizes = ParallelSizes.from_config(config, launch.world)
    if dist.is_initialized():
        raise RuntimeError("process groups exist already; call Parallel.shutdown() first")
    _set_threads(config, launch)
    device, backend = _pick_device(launch)
    install()
    install_fused_adam()
    global _lives
    _lives += 1
    store = dist.PrefixStore(f"ra3/{_lives}", _open_store(launch, timedelta(seconds=config.timeout_s)))
    whereabouts = Whereabouts(dist.PrefixStore("where", store), launch.rank)
    if launch.world == 1:
        whereabouts.run_alone()
    handle = Parallel(sizes, launch, device, backend, whereabouts, config.timeout_s)
    handle.start_groups()
    return handle


def _build_groups(handle: Parallel, timeout: timedelta) -> None:
    pg = handle.pg_collection
    device_groups = {"world": dist.group.WORLD, "tp": pg.tp, "pp": pg.pp, "cp": pg.cp}
    device_groups |= {"dp": pg.dp, "dp_cp": pg.dp_cp, "mp": pg.mp}
    for name in GROUP_NAMES:
        device_group = device_groups[name]
        ranks = tuple(dist.get_process_group_ranks(device_group))
        control = device_group
        if handle.backend != "gloo":
            control = _gloo_twin(ranks, handle, timeout)
        among_all, own = tuple(handle.first_rank + r for r in ranks), ranks.index(handle.rank)
        handle._groups[name] = Group(name, among_all, own, device_group, control, handle.whereabouts, handle.timeout_s)


def _gloo_twin(ranks: tuple[int, ...], handle: Parallel, timeout: timedelta) -> Any:
    """A gloo group with the same ranks; every rank makes every sibling's, in the same order, as torch demands."""
    everybody: list[Any] = [None] * handle.world_size
    dist.all_gather_object(everybody, ranks)
    mine = None
    for members in _unique(everybody):
        made = dist.new_group(list(members), timeout=timeout, backend="gloo")
        mine = made if members == ranks else mine
    return mine


def _unique(items: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return sorted(set(items))


def seed_everything(seed: int, parallel: Parallel) -> None:
    """Seed python, numpy, torch and Megatron's RNG tracker.

    Replicas get the same seed: dropout is off in every supported model, and data order is drawn elsewhere. Pipeline
    stages differ, so that equal layers of different stages do not start with equal weights; so do, in Megatron's
    tracker, processes with different experts.
    """
    from megatron.core import tensor_parallel

    stage_seed = seed + 100 * parallel.pipeline_rank
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)  # noqa: NPY002  libraries draw from the global generator
    torch.manual_seed(stage_seed)
    # force_reset_rng: a second call in one process (tests, a second stage) must start from the same states.
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)
