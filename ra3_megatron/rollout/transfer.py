"""Weights from a replica that trains to all that generate: every part of the model over a group of its own.

Both sides divide the model alike, so the process with part (t, p) of a training replica broadcasts its parameters as
they are to the processes with part (t, p) of the generating ones; nothing is gathered or converted.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ra3_megatron.checkpoint.capture import synchronise_parameters
from ra3_megatron.checkpoint.hashing import ParameterSums
from ra3_megatron.model.factory import unwrap
from ra3_megatron.parallel.collectives import deadline, gather_objects
from ra3_megatron.parallel.groups import Parallel
from ra3_megatron.parallel.whereabouts import Group

CHECK_EVERY = 16
"""Transfers from one comparison of hashes to the next; the first is always compared."""


class WeightTransfer:
    """The two ends of the transfer: the same calls on every process of both sides.

    `chunks` are this process's, wrapped or not; `part` the processes with the same part of the model, the one that
    sends first (none on training replicas but the first). Raises RuntimeError where the parts are none of one model.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], parallel: Parallel, part: Group | None) -> None:
        self._chunks, self._parallel, self._part = list(chunks), parallel, part
        self._done = 0
        self._refuse_buffers()
        facts = [(name, tuple(p.shape), str(p.dtype)) for name, p in self._parameters().items()]
        self._compare(facts, "parameters of the model")

    def exchange(self, version: int) -> float:
        """Send, or receive, the weights that have taken `version` steps; returns the seconds it took.

        Raises RuntimeError when a process expects another version, and, on the first and every `CHECK_EVERY`-th call,
        when what came differs from what was sent.
        """
        start = time.monotonic()
        name = f"transfer of the weights of step {version}"
        self._parallel.mark(name)
        synchronise_parameters(self._chunks)
        self._compare(version, f"version at the {name}")
        if self._part is not None:
            self._parallel.synchronize()
            with deadline(self._part, name):
                self._broadcast(self._part)
                self._parallel.synchronize()
        if self._done % CHECK_EVERY == 0:
            self._compare(self._hash() if self._part is not None else "", f"hash after the {name}")
        self._done += 1
        return time.monotonic() - start

    def _refuse_buffers(self) -> None:
        """Buffers that belong to a model's state would stay as they are on the other side."""
        sent = {id(p) for chunk in self._chunks for p in unwrap(chunk).parameters()}
        for chunk in self._chunks:
            for name, value in unwrap(chunk).state_dict(keep_vars=True).items():
                if isinstance(value, torch.Tensor) and id(value) not in sent and not name.endswith("_extra_state"):
                    raise RuntimeError(f"{name} is part of the model's state and no parameter; it would not be sent")

    def _parameters(self) -> dict[str, torch.Tensor]:
        return {
            f"{number}.{name}": parameter.detach()
            for number, chunk in enumerate(self._chunks)
            for name, parameter in unwrap(chunk).named_parameters()
        }

    def _broadcast(self, part: Group) -> None:
        # As bytes: every dtype that a backend can or cannot reduce is the same to a copy.
        works = [
            dist.broadcast(p.view(-1).view(torch.uint8), group=part.device_group, group_src=0, async_op=True)
            for p in self._parameters().values()
        ]
        for work in works:
            work.wait()

    def _hash(self) -> str:
        sums = ParameterSums()
        for name, parameter in self._parameters().items():
            sums.add(name, parameter, [0] * parameter.dim(), parameter.shape)
        return sums.hexdigest()

    def _compare(self, value: Any, what: str) -> None:
        """Raise unless all processes of the part have the same `value`."""
        if self._part is None:
            return
        found = gather_objects(self._part, value, what)
        other = [rank for rank, one in zip(self._part.ranks, found, strict=True) if one != found[0]]
        if other:
            sent, got = (str(v)[:200] for v in (found[0], found[self._part.ranks.index(other[0])]))
            raise RuntimeError(
                f"{what}: processes {other} have another than process {self._part.ranks[0]}, which sends: {got} "
                f"instead of {sent}"
            )
