"""A run's processes as two worlds for a while: some replicas of the model only train, the others only generate.

Each side is a world of its own, with its own torch and Megatron-Core groups, so that no library call of one side waits
for the other: an optimizer, a checkpoint and a rollout engine are used as if the other side were not there. What the
sides exchange goes over groups made here, of which torch's default group knows nothing.
"""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ra3_megatron.config.control import Interrupted
from ra3_megatron.config.errors import UserError
from ra3_megatron.parallel.collectives import barrier, gather_objects, wait_for_all
from ra3_megatron.parallel.groups import Parallel
from ra3_megatron.parallel.whereabouts import Group, PeerFailed


@dataclass(frozen=True)
class Side:
    """This process's place in a split run."""

    trains: bool
    """Whether its replica trains; else it generates."""
    parallel: Parallel
    """The world of its side."""
    both: Group
    """All processes, those that train first; no tensors of the model's device."""
    leaders: Group | None
    """The first process of every replica, those that train first, likewise; none on other processes."""
    part: Group | None
    """The processes that hold the same part of the model: of the first training replica, which is the first of the
    group, and of all that generate. None on other training replicas."""
    training: int
    """Replicas that train."""
    generating: int
    """Replicas that generate."""


@contextmanager
def split(whole: Parallel, generating: int, silence_s: float) -> Iterator[Side]:
    """Take the world apart and put it together again at the end; the groups of `whole` are closed meanwhile.

    The last `generating` replicas generate: the processes are divided at one number, so that no replica lies on both
    sides. Whatever one side raises inside the block, the other one raises as well, at its next exchange; at the end
    the sides wait for one another while anything is heard, at most `silence_s` of silence.
    """
    sizes, where = whole.sizes, whole.whereabouts
    training = sizes.data - generating
    assert 0 < generating < sizes.data, f"{sizes.data} replicas, {generating} of them to generate"
    replica = sizes.world // sizes.data
    trains = whole.rank < training * replica
    first, count = (0, training) if trains else (training * replica, generating)
    barrier(whole.world, "begin of the split")
    whole.end_groups()
    launch = replace(whole.launch, rank=whole.rank - first, world=count * replica)
    own = replace(
        whole,
        sizes=replace(sizes, data=count, world=count * replica),
        launch=launch,
        first_rank=first,
        pg_collection=None,
        _groups={},
    )
    joint = _Joint(whole)
    try:
        own.start_groups()
        yield joint.side(trains, own, training, generating)
        wait_for_all(joint.both, 0, "end of the split", silence_s)
    except BaseException as error:
        # Who leaves in good order has told the other side, and who was told of a failure need not tell it again.
        if not isinstance(error, PeerFailed | Interrupted):
            where.fail(traceback.format_exc(), error if isinstance(error, UserError) else None)
        joint.end(failed=True)
        own.end_groups(failed=True)
        raise
    joint.end(failed=False)
    own.end_groups()
    whole.start_groups()


class _Joint:
    """Groups that span both sides, made of nothing but the store: torch's own factories know one world only."""

    def __init__(self, whole: Parallel) -> None:
        self._whole, self._made = whole, []  # type: Parallel, list[Any]
        self._number = whole.rank
        self.both = self._group("both", range(whole.world_size), tensors=False)

    def side(self, trains: bool, own: Parallel, training: int, generating: int) -> Side:
        """Collective over all processes."""
        place = (trains, own.data_rank, own.pipeline_rank, own.tensor_rank)
        places = gather_objects(self.both, place, "places of the split")
        # The number of the first process of a replica is the lowest of its numbers.
        leaders = [n for n, (_, _, pipeline, tensor) in enumerate(places) if pipeline == tensor == 0]
        part = [n for n, p in enumerate(places) if p[2:] == place[2:] and (not p[0] or p[1] == 0)]
        return Side(
            trains,
            own,
            self.both,
            self._group("leaders", leaders, tensors=False) if self._number in leaders else None,
            self._group("part", part, tensors=True) if self._number in part else None,
            training,
            generating,
        )

    def _group(self, name: str, ranks: Sequence[int], tensors: bool) -> Group:
        """A group of the processes `ranks`; made by these alone. `tensors`: for tensors on the model's device, too."""
        whole, own = self._whole, list(ranks).index(self._number)
        control = device = self._start("gloo", name, ranks, own)
        if tensors and whole.backend != "gloo":
            device = self._start(whole.backend, name, ranks, own)
        return Group(name, tuple(ranks), own, device, control, whole.whereabouts, whole.timeout_s)

    def _start(self, backend: str, name: str, ranks: Sequence[int], own: int) -> Any:
        whole = self._whole
        key = f"joint/{whole.starts}/{name}/{'-'.join(map(str, ranks))}/{backend}"
        store, timeout = dist.PrefixStore(key, whole.whereabouts.store), timedelta(seconds=whole.timeout_s)
        group = dist.ProcessGroup(store, own, len(ranks))
        if backend == "gloo":
            kind = dist.ProcessGroup.BackendType.GLOO
            made: Any = dist.ProcessGroupGloo(store, own, len(ranks), timeout)
        else:
            kind, options = dist.ProcessGroup.BackendType.NCCL, dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            made = dist.ProcessGroupNCCL(store, own, len(ranks), options)
        made._set_sequence_number_for_group()
        group._set_default_backend(kind)
        group._register_backend(torch.device("cpu") if backend == "gloo" else whole.device, kind, made)
        self._made.append(group)
        return group

    def end(self, failed: bool) -> None:
        """Close all of them."""
        for group in self._made:
            (group.abort if failed else group.shutdown)()
        self._made = []
